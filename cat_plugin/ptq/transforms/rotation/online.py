"""Inputs of linear layers that no matrix in front can rotate, rotated while the network runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from cat_plugin.ptq.graph.constants import own_constant
from cat_plugin.ptq.graph.ops import ACTIVATIONS, constant, is_call, operand

__all__ = ["FeedForward", "find_feed_forwards"]

_aten = torch.ops.aten


@dataclass
class FeedForward:
    """A linear layer behind a product of two activations, or a function: the last one of a feed-forward network.

    With orthogonal ``A`` (a, a) and ``B`` (b, b), its input, seen as (a, b), becomes ``A' X B`` and its weight ``W (A x B)``
    with the Kronecker product: ``a + b`` multiplications for each feature, beside as many as the layer has outputs.

    Attributes
    ----------
    source, layer : fx.Node
        The product or function, or the factors and shifts of the channels behind it, and the layer.
    """

    source: fx.Node
    layer: fx.Node

    @property
    def width(self) -> int:
        """Features."""
        return int(self.source.meta["val"].shape[-1])

    def rotate(self, module: fx.GraphModule, a: Tensor, b: Tensor) -> None:
        """Rewrite the graph for two float64 orthogonal matrices, in place; its function stays as it is."""
        weight = own_constant(module, self.layer, 1)
        weight.copy_(weight.double() @ torch.kron(a, b).to(weight.device))
        graph, value = module.graph, self.source.meta["val"]
        with graph.inserting_before(self.layer):
            factors = []
            for side, matrix in (("rows", a.T), ("columns", b)):
                name = f"rotated_{side}_of_{self.layer.name}"
                module.register_buffer(name, matrix.to(weight).contiguous())
                factors.append(graph.create_node("get_attr", name))
            split = [len(a), len(b)]
            x = graph.call_function(_aten.unflatten.int, (self.source, -1, split))
            right = graph.call_function(_aten.matmul.default, (x, factors[1]))
            left = graph.call_function(_aten.matmul.default, (factors[0], right))
            merged = graph.call_function(_aten.flatten.using_ints, (left, -2, -1))
        for node in (x, right, left):
            node.meta = {**self.source.meta, "val": value.unflatten(-1, split)}
        merged.meta = dict(self.source.meta)
        self.layer.replace_input_with(self.source, merged)
        module.recompile()

    def turned(self, rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """(n, a b) of what the layer reads, or of its weight, as they are once they are rotated."""
        x = rows.reshape(-1, len(a), len(b))
        rotated: Tensor = a.T.to(rows) @ (x @ b.to(rows))
        return rotated.flatten(1)


def find_feed_forwards(module: fx.GraphModule) -> list[FeedForward]:
    """Linear layers of parameters that alone read a product of two activations or a function, in order of execution."""
    found = []
    for node in module.graph.nodes:
        if not is_call(node, {_aten.linear.default}) or constant(module, node.args[1]) is None:
            continue
        source = operand(node)
        made = operand(source, 1) if is_call(source, {_aten.addcmul.default}) else source
        if len(source.users) == len(made.users) == 1 and (_is_gate(made) or is_call(made, ACTIVATIONS)):
            found.append(FeedForward(source, node))
    return found


def _is_gate(node: fx.Node) -> bool:
    return is_call(node, {_aten.mul.Tensor}) and all(
        isinstance(factor, fx.Node) and factor.op != "get_attr" for factor in node.args
    )
