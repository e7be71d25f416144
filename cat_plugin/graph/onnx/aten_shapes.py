"""Converters of ATen operations that move values, and of the sizes that they are told."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.fx import Node

from cat_plugin.errors import ExportError
from cat_plugin.graph.onnx.writer import CONVERTERS, Writer, converts

__all__: list[str] = []

_END = np.iinfo(np.int64).max


def _rank(item: Node) -> int:
    return int(item.meta["val"].ndim)


@converts("aten.sym_size.int")
def _size(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    shape = writer.emit("Shape", [writer.value(given["self"])])
    return writer.emit("Gather", [shape, writer.integers([given["dim"] % _rank(given["self"])])], axis=0)


def _of_sizes(op: str) -> Any:
    def convert(writer: Writer, node: Node, given: dict[Any, Any]) -> str:
        return writer.emit(op, [writer.sizes([given[0]]), writer.sizes([given[1]])])

    return convert


# Sizes are positive, so that Div of integers rounds them as // does.
for _name, _op in {"mul": "Mul", "add": "Add", "sub": "Sub", "floordiv": "Div"}.items():
    CONVERTERS[_name] = _of_sizes(_op)


@converts("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default")
def _reshape(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    shape = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
    if shape.count(-1) > 1:
        return writer.emit(
            "Reshape",
            [writer.value(given["self"]), writer.sizes(given["size"] if "size" in given else given["shape"])],
        )
    return writer.emit("Reshape", [writer.value(given["self"]), writer.integers(shape)])


@converts("aten.flatten.using_ints", "aten.unflatten.int")
def _flatten(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    source = given["self"].meta["val"]
    shape = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
    if shape.count(-1) > 1:
        # A zero copies the size that the input has there.
        shape = [
            0 if size == -1 and axis < source.ndim and source.shape[axis] == node.meta["val"].shape[axis] else size
            for axis, size in enumerate(shape)
        ]  # fmt: skip
    if shape.count(-1) > 1:
        raise ExportError("several sizes of the result are not known; expected the batch's alone")
    return writer.emit("Reshape", [writer.value(given["self"]), writer.integers(shape)])


@converts("aten.permute.default", "aten.transpose.int", "aten.t.default", "aten.swapaxes.default")
@converts("aten.mT.default", "aten.numpy_T.default")
def _permute(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    source = given["self"]
    order = list(range(_rank(source)))
    if "dims" in given:
        order = [axis % len(order) for axis in given["dims"]]
    elif "numpy_T" in str(node.target):
        order = order[::-1]
    elif len(order) > 1:
        first = given.get("dim0", given.get("axis0", -2))
        second = given.get("dim1", given.get("axis1", -1))
        order[first], order[second] = order[second], order[first]
    return writer.emit("Transpose", [writer.value(source)], perm=order)


@converts("aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims")
def _squeeze(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    source = given["self"]
    axes = given.get("dim", list(range(_rank(source))))
    axes = [axis % _rank(source) for axis in (axes if isinstance(axes, list | tuple) else [axes])]
    # A size that is not known is not one: torch has guarded that when it traced.
    axes = [axis for axis in axes if isinstance(source.meta["val"].shape[axis], int)]
    axes = [axis for axis in axes if source.meta["val"].shape[axis] == 1]
    name = writer.value(source)
    return writer.emit("Squeeze", [name, writer.integers(axes)]) if axes else name


@converts("aten.unsqueeze.default")
def _unsqueeze(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    axis = given["dim"] % _rank(node)
    return writer.emit("Unsqueeze", [writer.value(given["self"]), writer.integers([axis])])


@converts("aten.select.int")
def _select(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    index = writer.value(given["index"], torch.int64)
    return writer.emit("Gather", [writer.value(given["self"]), index], axis=given["dim"])


@converts("aten.slice.Tensor")
def _slice(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    start, end = given["start"] or 0, _END if given["end"] is None else given["end"]
    limits = [writer.sizes([value]) for value in (start, end, given["dim"], given["step"])]
    return writer.emit("Slice", [writer.value(given["self"]), *limits])


@converts("aten.cat.default", "aten.concat.default")
def _cat(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    dtype = node.meta["val"].dtype
    return writer.emit("Concat", [writer.value(item, dtype) for item in given["tensors"]], axis=given["dim"])


@converts("aten.stack.default")
def _stack(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    axis = given["dim"] % _rank(node)
    parts = [
        writer.emit("Unsqueeze", [writer.value(item), writer.integers([axis])]) for item in given["tensors"]
    ]
    return writer.emit("Concat", parts, axis=axis)


@converts("aten.expand.default", "aten.expand_as.default")
def _expand(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    source = writer.value(given["self"])
    if "other" in given:
        return writer.emit("Expand", [source, writer.emit("Shape", [writer.value(given["other"])])])
    # minus one keeps a size: so does a one, since Expand broadcasts both ways
    sizes = [1 if isinstance(size, int) and size == -1 else size for size in given["size"]]
    return writer.emit("Expand", [source, writer.sizes(sizes)])


@converts("aten.repeat.default")
def _repeat(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    missing = len(given["repeats"]) - _rank(given["self"])
    source = writer.value(given["self"])
    if missing:
        source = writer.emit("Unsqueeze", [source, writer.integers(range(missing))])
    return writer.emit("Tile", [source, writer.sizes(given["repeats"])])


@converts("aten.pad.default", "aten.constant_pad_nd.default")
def _pad(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    rank, pads = _rank(node), given["pad"]
    mode = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}[
        given.get("mode", "constant")
    ]
    before, after = [0] * rank, [0] * rank
    for i in range(len(pads) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = pads[2 * i], pads[2 * i + 1]
    inputs = [writer.value(given["self"]), writer.integers(before + after)]
    if mode == "constant" and given.get("value"):
        inputs.append(writer.value(given["value"], node.meta["val"].dtype))
    return writer.emit("Pad", inputs, mode=mode)


@converts("aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default", "aten.unbind.int")
@converts("aten.split.sizes", "aten.unsafe_split.Tensor", "aten.unsafe_chunk.default")
def _split(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    parts = node.meta["val"]
    axis = given["dim"] % _rank(given["self"])
    source = writer.value(given["self"])
    if "unbind" in str(node.target):
        names = [
            writer.emit("Gather", [source, writer.value(i, torch.int64)], axis=axis)
            for i in range(len(parts))
        ]
    else:
        extents = [part.shape[axis] for part in parts]
        if not all(isinstance(extent, int) for extent in extents):
            raise ExportError("a split along an axis whose size is not known")
        names = writer.emit_many("Split", [source, writer.integers(extents)], len(extents), axis=axis)
    writer.parts[node] = names
    return names[0]


@converts("getitem")
def _part(writer: Writer, node: Node, given: dict[Any, Any]) -> str:
    source, index = given[0], given[1]
    if source not in writer.parts:
        raise ExportError("a part of a result that is no split")
    if int(index) >= len(writer.parts[source]):
        raise ExportError("the places of what is chosen are read, of which ONNX gives the values alone")
    return writer.parts[source][int(index)]


@converts("aten.pixel_shuffle.default")
def _pixel_shuffle(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    return writer.emit(
        "DepthToSpace", [writer.value(given["self"])], blocksize=given["upscale_factor"], mode="CRD"
    )


@converts("aten.full.default", "aten.zeros.default", "aten.ones.default")
def _full(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    fill = given.get("fill_value", 1 if "ones" in str(node.target) else 0)
    value = writer.value(fill, node.meta["val"].dtype)
    return writer.emit("Expand", [value, writer.sizes(given["size"])])


@converts("aten.index_select.default")
def _index_select(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    return writer.emit(
        "Gather", [writer.value(given["self"]), writer.value(given["index"])], axis=given["dim"]
    )


@converts("aten.embedding.default")
def _embedding(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    return writer.emit("Gather", [writer.value(given["weight"]), writer.value(given["indices"])], axis=0)
