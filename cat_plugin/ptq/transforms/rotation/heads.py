"""Channels of a head between values and the layer behind attention, which any matrix may mix."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from cat_plugin.ptq.graph.constants import own_constant
from cat_plugin.ptq.graph.ops import arguments, constant, is_call, operand
from cat_plugin.ptq.transforms.rotation.moves import MOVES, PIECES, moved, path_from

__all__ = ["Heads", "find_heads"]

_aten = torch.ops.aten


@dataclass
class Heads:
    """Values of one attention.

    With an orthogonal ``R`` of a head's size, the rows of each head of the values' weight become ``R' W``, and what the layer
    behind attention reads of it ``W R``: attention sums over tokens, and leaves the channels of a head beside each other.

    Attributes
    ----------
    values, reader : fx.Node
        The linear layers in front and behind.
    size : int
        Channels of a head.
    rows : list of int
        First row of each head among the outputs of ``values``.
    columns : list of int
        First column of each head among the inputs of ``reader``; heads may share values.
    """

    values: fx.Node
    reader: fx.Node
    size: int
    rows: list[int]
    columns: list[int]

    def rotate(self, module: fx.GraphModule, rotation: Tensor) -> None:
        """Fold a float64 orthogonal matrix of a head's size, in place; the function of the graph stays as it is."""
        weight = own_constant(module, self.values, 1)
        r = rotation.to(weight.device)
        biased = len(self.values.args) > 2 and self.values.args[2] is not None
        bias = own_constant(module, self.values, 2) if biased else None
        for start in self.rows:
            some = slice(start, start + self.size)
            weight[some] = (r.T @ weight[some].double()).to(weight.dtype)
            if bias is not None:
                bias[some] = (bias[some].double() @ r).to(bias.dtype)
        weight = own_constant(module, self.reader, 1)
        for start in self.columns:
            some = slice(start, start + self.size)
            weight[:, some] = (weight[:, some].double() @ r).to(weight.dtype)


def _back(node: fx.Node) -> list[fx.Node] | None:
    """From a linear layer to ``node``, which moves its outputs alone; None where there is anything else."""
    path = path_from(node, {_aten.linear.default})
    for earlier in [] if path is None else path[:-1]:
        # pieces of a packed layer are disjoint; anything else that reads the values would see them rotated
        if len(earlier.users) > 1 and not (is_call(earlier, PIECES) or _selected(list(earlier.users))):
            return None
    return path


def _selected(users: Sequence[fx.Node]) -> bool:
    picks = [arguments(user)[1:3] for user in users if is_call(user, {_aten.select.int})]
    return len(picks) == len(users) == len(set(picks)) and len({axis for axis, _ in picks}) == 1


def _forward(node: fx.Node) -> list[fx.Node] | None:
    """From behind ``node`` to the linear layer that alone reads it."""
    path: list[fx.Node] = []
    while True:
        if len(node.users) != 1:
            return None
        (node,) = node.users
        path.append(node)
        if is_call(node, {_aten.linear.default}):
            return path
        if not is_call(node, MOVES):
            return None


def _heads(module: fx.GraphModule, product: fx.Node, values: fx.Node) -> Heads | None:
    back, forward = _back(values), _forward(product)
    if back is None or forward is None or len(values.users) != 1:
        return None
    layer, reader = back[0], forward[-1]
    weights = [constant(module, node.args[1]) for node in (layer, reader)]
    if any(weight is None for weight in weights) or reader.args[0] not in (product, *forward):
        return None
    shape, out = (1, *layer.meta["val"].shape[1:]), product.meta["val"].shape
    if not all(isinstance(size, int) for size in (*shape, *out[1:])):
        return None
    labels = moved(torch.arange(shape[-1]).expand(shape), back[1:])
    if labels is None or labels.ndim < 2 or not bool((labels == labels[..., :1, :]).all()):
        return None
    labels = moved(labels[..., :1, :].expand(1, *out[1:]), forward[:-1])
    if labels is None:
        return None
    flat, size = labels.reshape(-1, labels.shape[-1]), int(out[-1])
    if not bool((flat == flat[0]).all()) or flat.shape[1] % size:
        return None
    runs = flat[0].reshape(-1, size)
    if not torch.equal(runs, runs[:, :1] + torch.arange(size)):
        return None
    rows = sorted(set(runs[:, 0].tolist()))
    apart = all(b - a >= size for a, b in itertools.pairwise(rows))
    return Heads(layer, reader, size, rows, list(range(0, flat.shape[1], size))) if apart else None


def find_heads(module: fx.GraphModule) -> list[Heads]:
    """Values whose heads may be rotated, in order of execution."""
    found = []
    for node in module.graph.nodes:
        if is_call(node, {_aten.scaled_dot_product_attention.default}):
            values = operand(node, 2)
        elif is_call(node, {_aten.matmul.default}) and isinstance(node.args[1], fx.Node):
            values = operand(node, 1)
        else:
            continue
        heads = _heads(module, node, values)
        if heads is not None:
            found.append(heads)
    return found
