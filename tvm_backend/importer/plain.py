"""Convolutional networks in terms of ATen's core operators, node by node.

``ExportedProgram.run_decompositions`` traces a whole program anew, which takes a second, though most of what a quantized network holds
stays as it is and little is to be written otherwise.  :func:`decomposed` gives the same operators for programs that hold nothing but what
it knows; of each it takes the forms that need no thought.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind, OutputKind

from cat_plugin.torch_compat import schema_of

__all__ = ["decomposed"]

aten = torch.ops.aten
_END = 2**62  # that of a slice which names none, or more

_INPUTS = (InputKind.USER_INPUT, InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


class _Other(Exception):
    """The graph holds something else."""


def _value(node: Any) -> torch.Tensor:
    """What torch says of a node's result."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor):
        raise _Other
    return value


def _require(condition: bool) -> None:
    if not condition:
        raise _Other


def _arguments(node: fx.Node) -> Iterator[Any]:
    """The arguments by position, defaults included."""
    for i, argument in enumerate(schema_of(node.target).arguments):
        if i < len(node.args):
            yield node.args[i]
        else:
            yield node.kwargs.get(argument.name, argument.default_value)


class _Copy:
    """A graph in the making, of the nodes of another."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = fx.Graph()
        self._inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self._of: dict[fx.Node, fx.Node] = {}
        self._batch: fx.Node | None = None
        for node in graph.nodes:
            if node.op == "call_function":
                _require(bool(node.users))
                self._of[node] = _OPERATORS.get(str(node.target), _other)(self, node)
            else:
                _require(node.op in ("placeholder", "output"))
                self.same(node)
            # what is returned is called in the signature as it was
            self._of[node].name = node.name

    def same(self, node: fx.Node) -> fx.Node:
        """The node as it is."""
        self._of[node] = self.graph.node_copy(node, self._of.__getitem__)
        return self._of[node]

    def call(self, node: fx.Node, target: Any, arguments: tuple[Any, ...], value: Any = None) -> fx.Node:
        """An operator in a node's place, or on the way to it with another `value`; its operands are nodes of either graph."""
        given = fx.node.map_arg(arguments, lambda each: self._of.get(each, each))
        new = self.graph.call_function(target, given)
        new.meta = {**node.meta, "val": node.meta["val"] if value is None else value}
        return new

    def sizes(self, node: fx.Node) -> list[Any]:
        """The sizes of a node's result, of which the first alone may be symbolic, that of the batch."""
        first, *others = _value(node).shape
        _require(all(isinstance(size, int) for size in others))
        return [first if isinstance(first, int) else self._size(first), *others]

    def _size(self, size: torch.SymInt) -> fx.Node:
        if self._batch is None:
            found = [each for each in self._inputs if _symbol(_value(each).shape[:1]) == _symbol([size])]
            _require(bool(found))
            with self.graph.inserting_after(self._of[self._inputs[-1]]):
                self._batch = self.graph.call_function(aten.sym_size.int, (self._of[found[0]], 0))
            self._batch.meta["val"] = size
        _require(_symbol([self._batch.meta["val"]]) == _symbol([size]))
        return self._batch


def _symbol(sizes: Sequence[Any]) -> Any:
    return sizes[0].node.expr if sizes and isinstance(sizes[0], torch.SymInt) else None


def _other(_copy: _Copy, _node: fx.Node) -> fx.Node:
    raise _Other


def _add(copy: _Copy, node: fx.Node) -> fx.Node:
    left, right, _ = _arguments(node)
    _require(_value(left).dtype == _value(right).dtype == torch.float32 and not node.kwargs)
    return copy.same(node)


def _conv2d(copy: _Copy, node: fx.Node) -> fx.Node:
    x, weight, bias, stride, padding, dilation, groups = _arguments(node)
    _require(_value(x).ndim == 4)
    return copy.call(
        node, aten.convolution.default, (x, weight, bias, stride, padding, dilation, False, [0, 0], groups)
    )


def _linear(copy: _Copy, node: fx.Node) -> fx.Node:
    x, weight, bias = _arguments(node)
    _require(_value(x).ndim == 2 and _value(weight).ndim == 2)
    turned = copy.call(node, aten.permute.default, (weight, [1, 0]), _value(weight).t())
    if bias is None:
        return copy.call(node, aten.mm.default, (x, turned))
    return copy.call(node, aten.addmm.default, (bias, x, turned))


def _flatten(copy: _Copy, node: fx.Node) -> fx.Node:
    x = node.args[0]
    _require(_value(x).ndim > _value(node).ndim and _value(x).is_contiguous())
    return copy.call(node, aten.view.default, (x, copy.sizes(node)))


def _adaptive_avg_pool2d(copy: _Copy, node: fx.Node) -> fx.Node:
    x, size = _arguments(node)
    _require(_value(x).ndim == 4 and list(size) == [1, 1])
    return copy.call(node, aten.mean.dim, (x, [-1, -2], True))


def _max_pool2d(copy: _Copy, node: fx.Node) -> fx.Node:
    x, _, stride, *_, ceil_mode = _arguments(node)
    _require(_value(x).ndim == 4 and bool(stride) and not ceil_mode and not node.kwargs)
    value = _value(node)
    pair = copy.call(node, aten.max_pool2d_with_indices.default, node.args, (value, value.to(torch.int64)))
    return copy.call(node, operator.getitem, (pair, 0))


def _mean(copy: _Copy, node: fx.Node) -> fx.Node:
    _, dims, *_ = _arguments(node)
    _require(bool(dims))
    return copy.same(node)


def _pad(copy: _Copy, node: fx.Node) -> fx.Node:
    x, widths, mode, value = _arguments(node)
    _require(mode == "constant" and value is None)
    _require(all(isinstance(width, int) and width >= 0 for width in widths) and any(widths))
    return copy.call(node, aten.constant_pad_nd.default, (x, widths))


def _slice(copy: _Copy, node: fx.Node) -> fx.Node:
    x, dim, start, end, step = _arguments(node)
    _require(all(isinstance(each, int) for each in (dim, start, end)) and 0 <= start < end and dim >= 0)
    size = _value(x).shape[dim]
    if (start, step) == (0, 1) and end >= (size if isinstance(size, int) else _END):
        return copy.call(node, aten.clone.default, (x,))
    _require(isinstance(size, int) and start < size)
    return copy.call(node, aten.slice.Tensor, (x, dim, start, min(end, size), step))


_OPERATORS: dict[str, Callable[[_Copy, fx.Node], fx.Node]] = {
    "aten.adaptive_avg_pool2d.default": _adaptive_avg_pool2d,
    "aten.add.Tensor": _add,
    "aten.conv2d.default": _conv2d,
    "aten.flatten.using_ints": _flatten,
    "aten.hardtanh.default": _Copy.same,
    "aten.linear.default": _linear,
    "aten.max_pool2d.default": _max_pool2d,
    "aten.mean.dim": _mean,
    "aten.pad.default": _pad,
    "aten.relu.default": _Copy.same,
    "aten.slice.Tensor": _slice,
    "cat.cluster_affine.default": _Copy.same,
    "quantized_decomposed.dequantize_per_channel.default": _Copy.same,
    "quantized_decomposed.dequantize_per_tensor.default": _Copy.same,
    "quantized_decomposed.quantize_per_tensor.default": _Copy.same,
}


def decomposed(program: Any) -> Any | None:
    """What ``program.run_decompositions(rewrites.table())`` computes with.

    Parameters
    ----------
    program : torch.export.ExportedProgram
        Left as it is.

    Returns
    -------
    torch.export.ExportedProgram or None
        With the same operators in the same order; None where the program holds other operators than are known here.
    """
    signature = program.graph_signature
    inputs = all(spec.kind in _INPUTS for spec in signature.input_specs)
    outputs = all(spec.kind == OutputKind.USER_OUTPUT for spec in signature.output_specs)
    returned = program.graph.output_node().all_input_nodes
    if not (inputs and outputs and all(node.op == "call_function" for node in returned)):
        return None
    try:
        graph = _Copy(program.graph).graph
    except _Other:
        return None
    return torch.export.ExportedProgram(
        root=program.graph_module,
        graph=graph,
        graph_signature=replace(
            signature, input_specs=[*signature.input_specs], output_specs=[*signature.output_specs]
        ),
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        constants=program.constants,
        verifiers=program.verifiers,
    )
