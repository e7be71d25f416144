"""Names for the ATen operations the engine knows: one table, used by every step that reads a graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import Argument

__all__ = [
    "ACTIVATIONS",
    "BATCH_NORM",
    "COMBINING",
    "COMPARING",
    "FLOAT_ONLY",
    "JOINING",
    "KEEPING_EQUAL",
    "KIND",
    "MOVING",
    "NORMS",
    "PRODUCTS",
    "SOFTMAX",
    "WEIGHTED",
    "arguments",
    "constant",
    "elements",
    "groups_of",
    "is_batch_size",
    "is_batched",
    "is_call",
    "is_depthwise",
    "is_relu6",
    "layer_name",
    "operand",
    "output_leaves",
    "row_bytes",
    "tensor_outputs",
    "weight_of",
]

_aten = torch.ops.aten

#: Operations with a weight that is quantized, and what the report calls them.
KIND: dict[Any, str] = {
    _aten.conv1d.default: "conv1d",
    _aten.conv1d.padding: "conv1d",
    _aten.conv2d.default: "conv2d",
    _aten.conv2d.padding: "conv2d",
    _aten.linear.default: "linear",
}
WEIGHTED = frozenset(KIND)

BATCH_NORM = frozenset({_aten.batch_norm.default})

#: Operations that only move values (a quantizer may stand before or after them).
MOVING = frozenset(
    {
        _aten.slice.Tensor,
        _aten.pad.default,
        _aten.constant_pad_nd.default,
        _aten.view.default,
        _aten.reshape.default,
        _aten._unsafe_view.default,
        _aten.flatten.using_ints,
        _aten.unflatten.int,
        _aten.permute.default,
        _aten.transpose.int,
        _aten.t.default,
        _aten.squeeze.default,
        _aten.squeeze.dim,
        _aten.squeeze.dims,
        _aten.unsqueeze.default,
        _aten.select.int,
        _aten.expand.default,
        _aten.contiguous.default,
        _aten.clone.default,
        _aten.alias.default,
        _aten.channel_shuffle.default,
        _aten.pixel_shuffle.default,
    }
)

#: Functions of one value, which a layer's kernel can apply to its output.
ACTIVATIONS = frozenset(
    {
        _aten.relu.default,
        _aten.relu6.default,
        _aten.hardtanh.default,
        _aten.silu.default,
        _aten.gelu.default,
        _aten.hardswish.default,
        _aten.hardsigmoid.default,
        _aten.sigmoid.default,
        _aten.tanh.default,
        _aten.leaky_relu.default,
        _aten.elu.default,
        _aten.clamp.default,
    }
)

#: Element-wise operations of two tensors, and concatenation.
COMBINING = frozenset({_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.cat.default})

#: Operations whose tensor inputs are quantized at ``residual_bits``: those and poolings.
JOINING = COMBINING | frozenset(
    {
        _aten.max_pool1d.default,
        _aten.max_pool2d.default,
        _aten.avg_pool1d.default,
        _aten.avg_pool2d.default,
        _aten.adaptive_avg_pool1d.default,
        _aten.adaptive_avg_pool2d.default,
        _aten.mean.dim,
    }
)

#: Operations that ask how two values compare, and those behind which values that were equal are still equal, or apart by nothing.
COMPARING = frozenset(
    getattr(getattr(_aten, name), kind)
    for name in ("eq", "ne", "lt", "le", "gt", "ge")
    for kind in ("Tensor", "Scalar")
) | {_aten.isclose.default}
KEEPING_EQUAL = MOVING | {
    _aten.max_pool1d.default,
    _aten.max_pool2d.default,
    _aten.neg.default,
    _aten.abs.default,
    _aten.sub.Tensor,
    _aten.upsample_nearest1d.vec,
    _aten.upsample_nearest2d.vec,
    _aten.to.dtype,
}

#: Products of two activations (attention); quantized only where ``attention_bits`` asks for it.
PRODUCTS: dict[Any, int] = {
    _aten.matmul.default: 2,
    _aten.bmm.default: 2,
    _aten.scaled_dot_product_attention.default: 3,
}

#: Operations that normalise, whose insides stay in float; so does what reaches them by additions alone.
NORMS = frozenset({_aten.layer_norm.default, _aten.rms_norm.default})
SOFTMAX = frozenset({_aten.softmax.int, _aten._softmax.default})

#: Operations with weights that stay in float, for the report.
FLOAT_ONLY = frozenset(
    {
        _aten.conv3d.default,
        _aten.conv3d.padding,
        _aten.conv_transpose1d.default,
        _aten.conv_transpose2d.input,
        _aten.conv_transpose3d.input,
        _aten.embedding.default,
        _aten.lstm.input,
        _aten.gru.input,
        _aten.rnn_tanh.input,
        _aten.rnn_relu.input,
        _aten.lstm_cell.default,
        _aten.gru_cell.default,
        _aten.embedding_bag.default,
        _aten.embedding_bag.padding_idx,
        _aten.addmm.default,
        _aten.baddbmm.default,
        _aten.einsum.default,
    }
)


def is_call(node: Any, targets: Any) -> bool:
    """Whether ``node`` is a graph node that calls one of ``targets``."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def arguments(node: Node) -> tuple[Any, ...]:
    """The positional arguments, of the types that the node's operation has."""
    return node.args


def operand(node: Node, index: int = 0) -> Node:
    """The node that is argument ``index`` of ``node``; for arguments that can be nothing else."""
    value = node.args[index]
    assert isinstance(value, Node)
    return value


def constant(module: GraphModule, value: Argument) -> Tensor | None:
    """The tensor that an argument reads from the module; None if it is no such argument."""
    if isinstance(value, Node) and value.op == "get_attr":
        found = getattr(module, str(value.target))
        return found if isinstance(found, Tensor) else None
    return None


def weight_of(module: GraphModule, node: Node) -> Tensor:
    """(O, ...) weight of a convolution or linear layer whose weight is a parameter."""
    found = constant(module, node.args[1])
    assert found is not None
    return found


def output_leaves(graph: Graph) -> list[Any]:
    """What a graph of flat tensors returns: nodes, and values that are no tensors."""
    result = next(n for n in graph.nodes if n.op == "output").args[0]
    return list(result) if isinstance(result, list | tuple) else [result]


def tensor_outputs(graph: Graph) -> list[Node]:
    """The results (N, ...) of a graph of flat tensors that are real numbers, in their order."""
    leaves = output_leaves(graph)
    return [n for n in leaves if isinstance(n, Node) and is_batched(n) and n.meta["val"].is_floating_point()]


def groups_of(node: Node) -> int:
    """Groups of a convolution, 1 for a linear layer."""
    return int(arguments(node)[6]) if len(node.args) > 6 else 1


def is_depthwise(module: GraphModule, node: Node) -> bool:
    """Whether a layer has filters, kept in the module, that read one channel each, of several."""
    weight = constant(module, node.args[1])
    return weight is not None and groups_of(node) > 1 and weight.shape[1] == 1


def is_relu6(node: Any) -> bool:
    """Whether the node clips its input at 0 and 6."""
    return is_call(node, {_aten.relu6.default}) or (
        is_call(node, {_aten.hardtanh.default}) and tuple(node.args[1:]) == (0.0, 6.0)
    )


def is_batched(node: Node) -> bool:
    """Whether the first axis of the node's value is the batch, and nothing but the batch."""
    value = node.meta.get("val") if isinstance(node, Node) and node.op != "get_attr" else None
    if not isinstance(value, Tensor) or value.ndim == 0:
        return False
    first = value.shape[0]
    if isinstance(first, int) or free_unbacked_symbols(
        first
    ):  # the number of what a mask selects is no batch
        return False
    return str(first).isidentifier()


def elements(extents: Sequence[Any]) -> int:
    """Their product, in which the number of what a mask selects, which nobody knows, counts as one."""
    return math.prod(1 if free_unbacked_symbols(extent) else int(extent) for extent in extents)


def row_bytes(node: Node) -> int:
    """Bytes of one row of the node's value; 0 of parameters, and where the first axis is not the batch."""
    if node.op in ("get_attr", "output") or not is_batched(node):
        return 0
    value: Tensor = node.meta["val"]
    return elements(value.shape[1:]) * value.element_size()


def is_batch_size(node: Node) -> bool:
    """Whether the node's value is the number of rows in the batch."""
    return (
        is_call(node, {torch.ops.aten.sym_size.int}) and arguments(node)[1] == 0 and is_batched(operand(node))
    )


def layer_name(node: Node) -> str:
    """Qualified name of the user's module that made ``node``, or the node's own name."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [path for path, _ in stack.values()]
    return names[-1] if names and names[-1] else node.name
