"""Channels of a head, which any matrix may mix: between values and the layer behind attention, and of queries and keys."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from cat_plugin.ptq.graph.constants import own_constant
from cat_plugin.ptq.graph.ops import arguments, constant, is_call, operand
from cat_plugin.ptq.transforms.rotation.moves import MOVES, PIECES, moved, numbered, path_from

__all__ = ["Heads", "Scores", "find_heads", "find_scores"]

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
        _rotate_rows(module, self.values, self.rows, rotation)
        weight = own_constant(module, self.reader, 1)
        r = rotation.to(weight.device)
        for start in self.columns:
            some = slice(start, start + self.size)
            weight[:, some] = (weight[:, some].double() @ r).to(weight.dtype)

    def turned(self, rows: Tensor, rotation: Tensor) -> Tensor:
        """(n, C) of what the reader reads, or of its weight, as they are once the heads are rotated."""
        r, out = rotation.to(rows), rows.clone()
        for start in self.columns:
            some = slice(start, start + self.size)
            out[:, some] = rows[:, some] @ r
        return out


@dataclass
class Scores:
    """Queries and keys of one attention without anything between their layers and the products.

    With an orthogonal ``R`` of a head's size, the rows of each head of both weights become ``R' W``: ``(q R) (k R)' = q k'``.

    Attributes
    ----------
    product : fx.Node
        The attention, or the product alone.
    size : int
        Channels of a head.
    queries, keys : tuple of fx.Node and list of int
        The linear layer, one where both are packed, and the first row of each head among its outputs, in the heads' order,
        for one input after the other; heads may share keys.
    """

    product: fx.Node
    size: int
    queries: tuple[fx.Node, list[int]]
    keys: tuple[fx.Node, list[int]]

    @property
    def rows(self) -> dict[fx.Node, list[int]]:
        """The linear layers, and the first row of each head among their outputs."""
        found: dict[fx.Node, list[int]] = {}
        for layer, starts in (self.queries, self.keys):
            found[layer] = sorted({*found.get(layer, []), *starts})
        return found

    def centre(self, module: fx.GraphModule, means: Tensor) -> bool:
        """Take a constant, (heads, size), from the keys of an attention by way of their layer's bias, in place.

        Every score of a query changes by one number, which the softmax does not see.

        Returns
        -------
        bool
            False, and nothing is done, where the layer has no bias or queries are keys.
        """
        layer, starts = self.keys
        queries_too = layer is self.queries[0] and set(starts) & set(self.queries[1])
        if queries_too or len(layer.args) < 3 or layer.args[2] is None:
            return False
        bias = own_constant(module, layer, 2)
        for start, mean in dict(zip(starts, means, strict=False)).items():  # the heads of one input
            bias[start : start + self.size] -= mean.to(bias)
        return True

    def rotate(self, module: fx.GraphModule, rotation: Tensor) -> None:
        """Fold a float64 orthogonal matrix of a head's size, in place; the function of the graph stays as it is."""
        for layer, rows in self.rows.items():
            _rotate_rows(module, layer, rows, rotation)


def _rotate_rows(module: fx.GraphModule, layer: fx.Node, rows: Sequence[int], rotation: Tensor) -> None:
    weight = own_constant(module, layer, 1)
    r, size = rotation.to(weight.device), len(rotation)
    biased = len(layer.args) > 2 and layer.args[2] is not None
    bias = own_constant(module, layer, 2) if biased else None
    for start in rows:
        some = slice(start, start + size)
        weight[some] = (r.T @ weight[some].double()).to(weight.dtype)
        if bias is not None:
            bias[some] = (bias[some].double() @ r).to(bias.dtype)


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
    out = numbered(product)
    labels = moved(numbered(layer), back[1:])
    if labels is None or labels.ndim < 2 or not bool((labels == labels[..., :1, :]).all()):
        return None
    labels = moved(labels[..., :1, :].expand(out.shape), forward[:-1])
    if labels is None:
        return None
    flat, size = labels.reshape(-1, labels.shape[-1]), out.shape[-1]
    if not bool((flat == flat[0]).all()) or flat.shape[1] % size:
        return None
    rows = _starts(flat[0].reshape(-1, size))
    return None if rows is None else Heads(layer, reader, size, rows, list(range(0, flat.shape[1], size)))


def _starts(runs: Tensor) -> list[int] | None:
    """First numbers of runs of consecutive numbers that do not overlap; None of any others."""
    size = runs.shape[1]
    if not torch.equal(runs, runs[:, :1] + torch.arange(size)):
        return None
    rows = sorted(set(runs[:, 0].tolist()))
    return rows if all(b - a >= size for a, b in itertools.pairwise(rows)) else None


def _rows(module: fx.GraphModule, node: fx.Node, transposed: bool) -> tuple[fx.Node, list[int]] | None:
    """The linear layer whose outputs ``node`` moves into heads (..., tokens, channels), and the first row of each."""
    path = _back(node)
    if path is None or len(node.users) != 1 or constant(module, path[0].args[1]) is None:
        return None
    labels = moved(numbered(path[0]), path[1:])
    if labels is None or labels.ndim < 3:
        return None
    labels = labels.mT if transposed else labels
    if not bool((labels == labels[..., :1, :]).all()):
        return None
    runs = labels[..., 0, :].reshape(-1, labels.shape[-1])
    return None if _starts(runs) is None else (path[0], runs[:, 0].tolist())


def find_scores(module: fx.GraphModule) -> list[Scores]:
    """Queries and keys whose heads may be rotated, in order of execution."""
    found = []
    for node in module.graph.nodes:
        attention = is_call(node, {_aten.scaled_dot_product_attention.default})
        if not attention and not is_call(node, {_aten.matmul.default}):
            continue
        if not all(isinstance(each, fx.Node) for each in node.args[:2]):
            continue
        queries, keys = _rows(module, operand(node, 0), False), _rows(module, operand(node, 1), not attention)
        if queries is None or keys is None:
            continue
        found.append(Scores(node, int(operand(node, 0).meta["val"].shape[-1]), queries, keys))
    return found


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
