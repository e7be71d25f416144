"""Where channels of a layer end up behind nodes that only move values."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from cat_plugin.ptq.graph.ops import MOVING, arguments, is_call

__all__ = ["MOVES", "PIECES", "moved", "numbered", "path_from"]

_aten = torch.ops.aten
PIECES = frozenset(
    {_aten.chunk.default, _aten.split.Tensor, _aten.split_with_sizes.default, _aten.unbind.int}
)
"""What takes a value apart; each piece is then picked out."""
MOVES = (MOVING - {_aten.pad.default, _aten.constant_pad_nd.default, _aten.expand.default}) | {
    _aten.repeat_interleave.self_int
}
"""What puts values elsewhere, or repeats them, and makes none."""


def path_from(node: fx.Node, layers: Collection[Any]) -> list[fx.Node] | None:
    """From a layer to `node`, which moves its outputs alone; None where there is anything else."""
    path = [node]
    while not is_call(path[-1], layers):
        last = path[-1]
        piece = last.op == "call_function" and last.target is operator.getitem
        if not (is_call(last, MOVES | PIECES) or piece) or not isinstance(last.args[0], fx.Node):
            return None
        path.append(last.args[0])
    return path[::-1]


def numbered(node: fx.Node, axis: int = -1) -> Tensor:
    """Numbers along an axis of a node's value, of its shape for a batch of two."""
    sizes = [
        size
        if isinstance(size, int)
        else int(size.node.expr.subs(dict.fromkeys(size.node.expr.free_symbols, 2)))
        for size in node.meta["val"].shape
    ]
    numbers = torch.arange(sizes[axis]).view(-1, *[1] * (len(sizes) - 1 - axis % len(sizes)))
    return numbers.expand(sizes)


def moved(labels: Tensor, path: Sequence[fx.Node]) -> Tensor | None:
    """Numbers of channels behind the nodes of a path; None where sizes of the graph play a part, or where values are made."""
    found = labels
    for node in path:
        known = is_call(node, MOVES | PIECES) or node.target is operator.getitem
        if not known or len(node.all_input_nodes) != 1 or node.kwargs:
            return None
        target, rest = node.target, arguments(node)[1:]
        assert callable(target)
        found = target(found, *rest)
    return found
