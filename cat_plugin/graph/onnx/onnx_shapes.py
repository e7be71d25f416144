"""ONNX operators that move values, in torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from cat_plugin.graph.onnx.operators import Known, Step, Value, implements, to_tensor

__all__: list[str] = []

#: The end of a slice from which on it means the end of the axis; files say 1e9, or the largest of a type.
_FAR = 10**9


@implements("Reshape")
def _reshape(step: Step, x: Value, shape: Value = None) -> Tensor:
    tensor = to_tensor(x)
    sizes = step.option("shape", shape) or []
    if not step.get("allowzero", 0):
        sizes = [tensor.shape[i] if isinstance(s, int) and s == 0 else s for i, s in enumerate(sizes)]
    if step.fixed_batch is not None and len(sizes) > 1 and sizes[0] == step.fixed_batch:
        # The file was exported for one batch size: the first axis is the batch's, whatever its size.
        sizes[0] = tensor.shape[0]
    return tensor.reshape(sizes)


@implements("Flatten")
def _flatten(step: Step, x: Value) -> Tensor:
    tensor, axis = to_tensor(x), step.get("axis", 1)
    axis += tensor.ndim if axis < 0 else 0
    if axis == 1:
        return tensor.flatten(1)
    return tensor.reshape(1, -1) if axis == 0 else tensor.flatten(0, axis - 1).flatten(1)


@implements("Transpose")
def _transpose(step: Step, x: Value) -> Tensor:
    tensor = to_tensor(x)
    return tensor.permute(step.get("perm", list(range(tensor.ndim))[::-1]))


@implements("Squeeze")
def _squeeze(step: Step, x: Value, axes: Value = None) -> Tensor:
    tensor, given = to_tensor(x), step.option("axes", axes)
    return tensor.squeeze() if given is None else tensor.squeeze(tuple(given))


@implements("Unsqueeze")
def _unsqueeze(step: Step, x: Value, axes: Value = None) -> Tensor:
    tensor, given = to_tensor(x), step.option("axes", axes) or []
    rank = tensor.ndim + len(given)
    for axis in sorted(axis % rank for axis in given):
        tensor = tensor.unsqueeze(axis)
    return tensor


@implements("Concat")
def _concat(step: Step, *values: Value) -> Tensor:
    return torch.cat([to_tensor(value) for value in values], step.get("axis"))


@implements("Split")
def _split(step: Step, x: Value, split: Value = None) -> tuple[Tensor, ...]:
    tensor, axis = to_tensor(x), step.get("axis", 0)
    sizes = step.option("split", split)
    if sizes is None:
        count = len(step.outputs)
        return torch.split(tensor, -(-tensor.shape[axis] // count), axis)
    return torch.split(tensor, sizes, axis)


@implements("Slice")
def _slice(
    step: Step, x: Value, starts: Value = None, ends: Value = None, axes: Value = None, steps: Value = None
) -> Tensor:
    tensor = to_tensor(x)
    first, last = step.option("starts", starts) or [], step.option("ends", ends) or []
    along = step.option("axes", axes) or list(range(len(first)))
    strides = step.option("steps", steps) or [1] * len(first)
    for axis, start, end, stride in zip(along, first, last, strides, strict=True):
        if stride < 0:
            extent = tensor.shape[axis]
            picked = range(extent)[start : None if end < -extent else end : stride]
            tensor = tensor.index_select(axis, torch.tensor(list(picked), dtype=torch.int64))
        elif isinstance(end, int) and end >= _FAR:
            # Compared with a size that is not known, a number so large would limit the batch.
            if start != 0 or stride != 1:
                tensor = torch.ops.aten.slice.Tensor(tensor, axis, start, None, stride)
        else:
            tensor = torch.ops.aten.slice.Tensor(tensor, axis, start, end, stride)
    return tensor


@implements("Gather")
def _gather(step: Step, x: Value, indices: Value) -> Tensor:
    axis = step.get("axis", 0)
    tensor = to_tensor(x)
    if isinstance(indices, Known) and indices.array.ndim == 0:
        return tensor.select(axis, indices.numbers()[0])
    chosen = to_tensor(indices).long()
    if axis == 0 and tensor.ndim == 2 and isinstance(x, Known):
        return F.embedding(torch.where(chosen < 0, chosen + tensor.shape[0], chosen), tensor)
    axis %= tensor.ndim
    chosen = torch.where(chosen < 0, chosen + tensor.shape[axis], chosen)
    flat = tensor.index_select(axis, chosen.reshape(-1))
    return flat.reshape(*tensor.shape[:axis], *chosen.shape, *tensor.shape[axis + 1 :])


@implements("GatherElements")
def _gather_elements(step: Step, x: Value, indices: Value) -> Tensor:
    tensor, axis, chosen = to_tensor(x), step.get("axis", 0), to_tensor(indices).long()
    return torch.gather(tensor, axis, torch.where(chosen < 0, chosen + tensor.shape[axis], chosen))


@implements("Expand")
def _expand(step: Step, x: Value, shape: Value) -> Tensor:
    tensor, sizes = to_tensor(x), step.known(shape, "the shape")
    missing = max(0, len(sizes) - tensor.ndim)
    held = [1] * missing + list(tensor.shape)
    wanted = [1] * (len(held) - len(sizes)) + list(sizes)
    # A one keeps what is there, since both sides broadcast, and so does what is there: nothing then asks whether the batch
    # is one.
    kept = [
        -1 if axis >= missing and (_same(size, 1) or _same(size, there)) else size
        for axis, (there, size) in enumerate(zip(held, wanted, strict=True))
    ]
    return tensor.expand(kept)


def _same(a: Any, b: Any) -> bool:
    """Whether two sizes are equal whatever the symbols in them stand for."""
    return bool(statically_known_true(a == b))


@implements("Tile")
def _tile(step: Step, x: Value, repeats: Value) -> Tensor:
    return to_tensor(x).repeat(step.known(repeats, "repeats"))


@implements("Pad")
def _pad(step: Step, x: Value, pads: Value = None, value: Value = None, axes: Value = None) -> Tensor:
    tensor = to_tensor(x)
    amounts = step.option("pads", pads) or []
    along = step.option("axes", axes) or list(range(tensor.ndim))
    half = len(amounts) // 2
    pairs = [(0, 0)] * tensor.ndim
    for i, axis in enumerate(along):
        pairs[axis] = (amounts[i], amounts[half + i])
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}[
        step.get("mode", "constant")
    ]
    while pairs and pairs[0] == (0, 0):
        pairs = pairs[1:]
    flat = [amount for pair in reversed(pairs) for amount in pair]
    if not flat:
        return tensor
    if mode != "constant":
        return F.pad(tensor, flat, mode)
    fill = step.known(value, "the value") if value is not None else [step.get("value", 0.0)]
    return F.pad(tensor, flat, value=fill[0] if fill else 0.0)


@implements("DepthToSpace")
def _depth_to_space(step: Step, x: Value) -> Tensor:
    tensor, block = to_tensor(x), step.get("blocksize")
    if step.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(tensor, block)
    n, c, h, w = tensor.shape
    parts = tensor.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(n, c // block**2, h * block, w * block)


@implements("SpaceToDepth")
def _space_to_depth(step: Step, x: Value) -> Tensor:
    tensor, block = to_tensor(x), step.get("blocksize")
    n, c, h, w = tensor.shape
    parts = tensor.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(n, c * block**2, h // block, w // block)


@implements("Trilu")
def _trilu(step: Step, x: Value, k: Value = None) -> Tensor:
    diagonal = 0 if k is None else step.known(k, "k")[0]
    return (torch.triu if step.get("upper", 1) else torch.tril)(to_tensor(x), diagonal)


@implements("OneHot")
def _one_hot(step: Step, indices: Value, depth: Value, values: Value) -> Tensor:
    count = int(step.known(depth, "the depth")[0])
    off, on = step.known(values, "the values")
    chosen = to_tensor(indices).long()
    axis = step.get("axis", -1)
    axis += chosen.ndim + 1 if axis < 0 else 0
    chosen = torch.where(chosen < 0, chosen + count, chosen).unsqueeze(axis)
    shape = [1] * chosen.ndim
    shape[axis] = count
    hit = chosen == torch.arange(count).reshape(shape)
    dtype = torch.from_numpy(values.array.copy()).dtype if isinstance(values, Known) else torch.float32
    return torch.where(hit, torch.tensor(on, dtype=dtype), torch.tensor(off, dtype=dtype))


@implements("ArgMax", "ArgMin")
def _extreme(step: Step, x: Value) -> Tensor:
    function: Any = torch.argmax if step.op == "ArgMax" else torch.argmin
    if step.get("select_last_index", 0):
        raise step.refuse("select_last_index; expected the first")
    result: Tensor = function(to_tensor(x), dim=step.get("axis", 0), keepdim=bool(step.get("keepdims", 1)))
    return result


@implements("TopK")
def _top_k(step: Step, x: Value, k: Value = None) -> tuple[Tensor, Tensor]:
    count = step.option("k", k) or [1]
    largest = bool(step.get("largest", 1))
    values, indices = torch.topk(to_tensor(x), count[0], step.get("axis", -1), largest)
    return values, indices
