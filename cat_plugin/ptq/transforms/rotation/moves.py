"""Where channels of a layer end up behind nodes that only move values."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from cat_plugin.ptq.graph.ops import MOVING, arguments, is_call

__all__ = ["MOVES", "PIECES", "is_piece", "moved", "path_from"]

_aten = torch.ops.aten
PIECES = frozenset(
    {_aten.chunk.default, _aten.split.Tensor, _aten.split_with_sizes.default, _aten.unbind.int}
)
"""What takes a value apart; each piece is then picked out."""
MOVES = (MOVING - {_aten.pad.default, _aten.constant_pad_nd.default, _aten.expand.default}) | {
    _aten.repeat_interleave.self_int
}
"""What puts values elsewhere, or repeats them, and makes none."""


def is_piece(node: fx.Node) -> bool:
    """Whether the node picks one of several results out."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"


def path_from(node: fx.Node, layers: Collection[Any]) -> list[fx.Node] | None:
    """From a layer to `node`, which moves its outputs alone; None where there is anything else."""
    path = [node]
    while not is_call(path[-1], layers):
        last = path[-1]
        if not (is_call(last, MOVES | PIECES) or is_piece(last)) or not isinstance(last.args[0], fx.Node):
            return None
        path.append(last.args[0])
    return path[::-1]


def moved(labels: Tensor, path: Sequence[fx.Node]) -> Tensor | None:
    """Numbers of channels behind the nodes of a path; None where sizes of the graph play a part."""
    found = labels
    for node in path:
        if len(node.all_input_nodes) != 1 or node.kwargs:
            return None
        target, rest = node.target, arguments(node)[1:]
        assert callable(target)
        found = target(found, *rest)
    return found
