"""Converters of ATen operations that put values elsewhere: turned round, sorted, summed up along an axis, written into a tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.fx import Node

from cat_plugin.errors import ExportError
from cat_plugin.graph.onnx.writer import CONVERTERS, Writer, converts

__all__: list[str] = []

_END = np.iinfo(np.int64).max


def _axis(node: Node, dim: int) -> int:
    return int(dim) % max(int(node.meta["val"].ndim), 1)


def _cut(writer: Writer, name: str, axis: int, start: int, end: int, step: int = 1) -> str:
    return writer.emit("Slice", [name, *(writer.integers([each]) for each in (start, end, axis, step))])


@converts("aten.flip.default")
def _flip(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    axes = [_axis(node, dim) for dim in given["dims"]]
    limits = [[-1] * len(axes), [-_END] * len(axes), axes, [-1] * len(axes)]
    return writer.emit("Slice", [writer.value(given["self"]), *map(writer.integers, limits)])


@converts("aten.cumsum.default")
def _cumsum(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    axis = writer.constant(np.array(_axis(node, given["dim"]), np.int64), "axis")
    return writer.emit("CumSum", [writer.value(given["self"], node.meta["val"].dtype), axis])


@converts("aten.max.dim", "aten.min.dim")
def _extreme_and_place(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    name, kind = writer.value(given["self"]), "Max" if ".max." in str(node.target) else "Min"
    dim, keep = int(given["dim"]), int(given["keepdim"])
    values = writer.emit(f"Reduce{kind}", [name, writer.integers([dim])], keepdims=keep)
    writer.parts[node] = [values, writer.emit(f"Arg{kind}", [name], axis=dim, keepdims=keep)]
    return values


@converts("aten.sort.default")
def _sort(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    source, dim = given["self"], given["dim"]
    size = source.meta["val"].shape[dim]
    if not isinstance(size, int):
        raise ExportError("values sorted along the batch")
    names = [writer.value(source), writer.integers([size])]
    writer.parts[node] = writer.emit_many(
        "TopK", names, 2, axis=_axis(source, dim), largest=int(given["descending"]), sorted=1
    )
    return writer.parts[node][0]


@converts("aten.topk.default")
def _topk(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    if not isinstance(given["k"], int):
        raise ExportError("as many of the largest values as the graph computes; expected a number")
    names = [writer.value(given["self"]), writer.integers([given["k"]])]
    axis, largest, ordered = _axis(given["self"], given["dim"]), int(given["largest"]), int(given["sorted"])
    writer.parts[node] = writer.emit_many("TopK", names, 2, axis=axis, largest=largest, sorted=ordered)
    return writer.parts[node][0]


@converts("aten.gather.default")
def _gather(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    names = [writer.value(given["self"]), writer.value(given["index"])]
    return writer.emit("GatherElements", names, axis=_axis(node, given["dim"]))


@converts("aten.scatter.value", "aten.scatter.src")
def _scatter(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    dtype, index = node.meta["val"].dtype, writer.value(given["index"])
    if "value" in given:
        source = writer.emit("Expand", [writer.value(given["value"], dtype), writer.emit("Shape", [index])])
    elif tuple(given["src"].meta["val"].shape) != tuple(given["index"].meta["val"].shape):
        raise ExportError("a part of what is scattered; cut it to the index first")
    else:
        source = writer.value(given["src"], dtype)
    names = [writer.value(given["self"], dtype), index, source]
    return writer.emit("ScatterElements", names, axis=_axis(node, given["dim"]))


@converts("aten.scatter_add.default", "aten.scatter_reduce.two")
def _scattered(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    """Sums, products or extremes of what is at a place and what is written there."""
    how = {"sum": "add", "prod": "mul", "amax": "max", "amin": "min"}.get(given.get("reduce", "sum"))
    if how is None or not given.get("include_self", True):
        raise ExportError("expected sum, prod, amax or amin, what is there included")
    names = [writer.value(given[name]) for name in ("self", "index", "src")]
    return writer.emit("ScatterElements", names, axis=_axis(node, given["dim"]), reduction=how)


@converts("aten.grid_sampler_2d.default", "aten.grid_sampler_3d.default")
def _sampled(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    modes = ["linear", "nearest", "cubic"][given["interpolation_mode"]]
    padding = ["zeros", "border", "reflection"][given["padding_mode"]]
    names = [writer.value(given["input"]), writer.value(given["grid"])]
    corners = int(given["align_corners"])
    return writer.emit("GridSample", names, mode=modes, padding_mode=padding, align_corners=corners)


@converts("aten.arange.default", "aten.arange.start", "aten.arange.start_step")
def _range(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    dtype = node.meta["val"].dtype
    limits = [
        writer.value(given.get(name, other), dtype) for name, other in (("start", 0), ("end", 0), ("step", 1))
    ]
    return writer.emit("Range", limits)


@converts("aten.full_like.default", "aten.zeros_like.default", "aten.ones_like.default")
def _filled_like(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    fill = given.get("fill_value", 1 if "ones" in str(node.target) else 0)
    shape = writer.emit("Shape", [writer.value(given["self"])])
    return writer.emit("Expand", [writer.value(fill, node.meta["val"].dtype), shape])


@converts("aten.copy.default")
def _copy(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    source = writer.value(given["src"], node.meta["val"].dtype)
    return writer.emit("Expand", [source, writer.emit("Shape", [writer.value(given["self"])])])


@converts("aten.slice_scatter.default", "aten.select_scatter.default")
def _written_into(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    """What is in front, what is written, and what is behind, side by side."""
    axis, dtype = _axis(node, given["dim"]), node.meta["val"].dtype
    size, step = node.meta["val"].shape[axis], given.get("step", 1)
    first, last = given.get("start", given.get("index")), given.get("end", _END)
    first, last = 0 if first is None else first, _END if last is None else last
    if not all(isinstance(each, int) for each in (size, first, last)) or step != 1:
        raise ExportError(
            "every so many values, or values at places that are computed, are written into a tensor"
        )
    whole, part = writer.value(given["self"], dtype), writer.value(given["src"], dtype)
    first = min(first + size if first < 0 else first, size)
    if "index" in given:
        part, last = writer.emit("Unsqueeze", [part, writer.integers([axis])]), first + 1
    last = max(first, min(last + size if last < 0 else last, size))
    pieces = [
        *([_cut(writer, whole, axis, 0, first)] if first else []),
        part,
        *([_cut(writer, whole, axis, last, size)] if last < size else []),
    ]
    return writer.emit("Concat", pieces, axis=axis)


@converts("aten._native_batch_norm_legit.no_stats")
def _own_statistics(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    """BatchNorm by what it is given: of a batch of one in which instances are channels, as instance normalization is written."""
    source = given["input"]
    rank = source.meta["val"].ndim
    x, axes = writer.value(source), writer.integers([axis for axis in range(rank) if axis != 1])
    centred = writer.emit("Sub", [x, writer.emit("ReduceMean", [x, axes], keepdims=1)])
    variance = writer.emit("ReduceMean", [writer.emit("Mul", [centred, centred]), axes], keepdims=1)
    deviation = writer.emit("Sqrt", [writer.emit("Add", [variance, writer.value(float(given["eps"]))])])
    name = writer.emit("Div", [centred, deviation])
    for op, item in (("Mul", given["weight"]), ("Add", given["bias"])):
        if item is not None:
            shape = writer.integers([-1, *[1] * (rank - 2)])
            name = writer.emit(op, [name, writer.emit("Reshape", [writer.value(item), shape])])
    writer.parts[node] = [name]
    return name


@converts("aten.expm1.default")
def _expm1(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    x = writer.value(given["self"], node.meta["val"].dtype)
    return writer.emit("Sub", [writer.emit("Exp", [x]), writer.value(1.0, node.meta["val"].dtype)])


for _name in ("sinh", "cosh", "asinh", "acosh", "atanh", "tan", "asin", "acos", "atan"):
    CONVERTERS[f"aten.{_name}.default"] = lambda writer, node, given: writer.emit(
        str(node.target).split(".")[1].capitalize(), [writer.value(given["self"], node.meta["val"].dtype)]
    )
