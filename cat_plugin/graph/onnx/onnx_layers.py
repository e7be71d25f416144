"""ONNX layers, poolings, norms, reductions and resizing, in torch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cat_plugin.graph.onnx.operators import Step, Value, implements, to_tensor

__all__: list[str] = []


def _pads(step: Step, extents: list[int], kernel: list[int]) -> tuple[list[int], list[int]]:
    """Padding before and after each spatial axis, of the attribute or as auto_pad has it."""
    count = len(kernel)
    mode = step.get("auto_pad", "NOTSET")
    if mode == "VALID":
        return [0] * count, [0] * count
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        pads = step.get("pads", [0] * 2 * count)
        return list(pads[:count]), list(pads[count:])
    strides, dilations = step.get("strides", [1] * count), step.get("dilations", [1] * count)
    before, after = [], []
    for extent, size, stride, dilation in zip(extents, kernel, strides, dilations, strict=True):
        total = max(0, (-(-extent // stride) - 1) * stride + (size - 1) * dilation + 1 - extent)
        low = total // 2 if mode == "SAME_UPPER" else total - total // 2
        before.append(low)
        after.append(total - low)
    return before, after


def _flat(before: list[int], after: list[int]) -> list[int]:
    """Padding as torch's pad takes it: last axis first."""
    return [amount for pair in reversed(list(zip(before, after, strict=True))) for amount in pair]


@implements("Conv")
def _conv(step: Step, x: Value, weight: Value, bias: Value = None) -> Tensor:
    tensor, kernel = to_tensor(x), to_tensor(weight)
    spatial = kernel.ndim - 2
    if spatial not in (1, 2, 3):
        raise step.refuse(f"{spatial} spatial axes; expected 1 to 3")
    before, after = _pads(step, list(tensor.shape[2:]), list(kernel.shape[2:]))
    if before != after:
        tensor, before = F.pad(tensor, _flat(before, after)), [0] * spatial
    function: Any = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    strides, dilations = step.get("strides", [1] * spatial), step.get("dilations", [1] * spatial)
    held = None if bias is None else to_tensor(bias)
    result: Tensor = function(tensor, kernel, held, strides, before, dilations, step.get("group", 1))
    return result


@implements("ConvTranspose")
def _conv_transpose(step: Step, x: Value, weight: Value, bias: Value = None) -> Tensor:
    tensor, kernel = to_tensor(x), to_tensor(weight)
    spatial = kernel.ndim - 2
    if step.get("output_shape") is not None or step.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise step.refuse("output_shape or auto_pad; expected pads")
    before, after = _pads(step, [], list(kernel.shape[2:]))
    extra = step.get("output_padding", [0] * spatial)
    if before != after:
        # More is cut behind than in front: torch cuts the same on both sides, and output_padding gives back.
        raise step.refuse("pads that differ on the two sides; expected the same")
    function: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial - 1]
    strides, dilations = step.get("strides", [1] * spatial), step.get("dilations", [1] * spatial)
    held = None if bias is None else to_tensor(bias)
    result: Tensor = function(tensor, kernel, held, strides, before, extra, step.get("group", 1), dilations)
    return result


@implements("Gemm")
def _gemm(step: Step, a: Value, b: Value, c: Value = None) -> Tensor:
    first, second = to_tensor(a), to_tensor(b)
    first = first.t() if step.get("transA", 0) else first
    weight = second if step.get("transB", 0) else second.t()
    alpha, beta = step.get("alpha", 1.0), step.get("beta", 1.0)
    bias = None if c is None else to_tensor(c)
    if alpha == 1.0 and (bias is None or (beta == 1.0 and bias.ndim == 1 and len(bias) == len(weight))):
        return F.linear(first, weight, bias)
    result: Tensor = F.linear(first, weight) * alpha
    return result if bias is None else result + bias * beta


@implements("MatMul")
def _matmul(step: Step, a: Value, b: Value) -> Tensor:
    return to_tensor(a) @ to_tensor(b)


@implements("Linear")
def _linear(step: Step, x: Value, weight: Value, bias: Value = None) -> Tensor:
    """A MatMul by a constant, with an Add of a constant behind it: made when a graph is read."""
    return F.linear(to_tensor(x), to_tensor(weight), None if bias is None else to_tensor(bias))


@implements("Einsum")
def _einsum(step: Step, *values: Value) -> Tensor:
    return torch.einsum(step.get("equation"), *[to_tensor(value) for value in values])


@implements("MaxPool")
def _max_pool(step: Step, x: Value) -> Tensor:
    tensor, kernel = to_tensor(x), step.get("kernel_shape")
    spatial = len(kernel)
    before, after = _pads(step, list(tensor.shape[2:]), kernel)
    if before != after or any(2 * pad > size for pad, size in zip(before, kernel, strict=True)):
        tensor, before = F.pad(tensor, _flat(before, after), value=-math.inf), [0] * spatial
    function: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[spatial - 1]
    strides, dilations = step.get("strides", [1] * spatial), step.get("dilations", [1] * spatial)
    result: Tensor = function(tensor, kernel, strides, before, dilations, bool(step.get("ceil_mode", 0)))
    return result


@implements("AveragePool")
def _average_pool(step: Step, x: Value) -> Tensor:
    tensor, kernel = to_tensor(x), step.get("kernel_shape")
    spatial = len(kernel)
    before, after = _pads(step, list(tensor.shape[2:]), kernel)
    counted, ceiled = bool(step.get("count_include_pad", 0)), bool(step.get("ceil_mode", 0))
    strides = step.get("strides", [1] * spatial)
    function: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[spatial - 1]
    result: Tensor
    if any(dilation != 1 for dilation in step.get("dilations", [])):
        raise step.refuse("dilations; expected 1")
    if before == after:
        result = function(tensor, kernel, strides, before, ceiled, counted)
        return result
    if ceiled:
        raise step.refuse("ceil_mode with pads that differ on the two sides; expected one of the two")
    padded = F.pad(tensor, _flat(before, after))
    result = function(padded, kernel, strides)
    if counted:
        return result
    inside: Tensor = function(F.pad(torch.ones_like(tensor[:1, :1]), _flat(before, after)), kernel, strides)
    return result / inside


@implements("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(step: Step, x: Value) -> Tensor:
    tensor = to_tensor(x)
    axes = list(range(2, tensor.ndim))
    return tensor.mean(axes, True) if step.op == "GlobalAveragePool" else tensor.amax(axes, True)


@implements("BatchNormalization")
def _batch_norm(step: Step, x: Value, scale: Value, bias: Value, mean: Value, variance: Value) -> Tensor:
    if step.get("training_mode", 0):
        raise step.refuse("training mode; export the model for inference")
    statistics = (to_tensor(mean), to_tensor(variance))
    weight, offset = to_tensor(scale), to_tensor(bias)
    return F.batch_norm(to_tensor(x), *statistics, weight, offset, eps=step.get("epsilon", 1e-5))


@implements("InstanceNormalization")
def _instance_norm(step: Step, x: Value, scale: Value, bias: Value) -> Tensor:
    tensor = to_tensor(x)
    weight, offset = to_tensor(scale), to_tensor(bias)
    return F.group_norm(tensor, tensor.shape[1], weight, offset, step.get("epsilon", 1e-5))


@implements("GroupNormalization")
def _group_norm(step: Step, x: Value, scale: Value, bias: Value) -> Tensor:
    if step.opset < 21:
        raise step.refuse("its opset 18 has scales by group; expected opset 21 or later")
    weight, offset = to_tensor(scale), to_tensor(bias)
    return F.group_norm(to_tensor(x), step.get("num_groups"), weight, offset, step.get("epsilon", 1e-5))


@implements("LayerNormalization")
def _layer_norm(step: Step, x: Value, scale: Value, bias: Value = None) -> Tensor:
    tensor, axis = to_tensor(x), step.get("axis", -1)
    shape = tensor.shape[axis % tensor.ndim :]
    held = None if bias is None else to_tensor(bias)
    return F.layer_norm(tensor, shape, to_tensor(scale), held, step.get("epsilon", 1e-5))


@implements("LRN")
def _lrn(step: Step, x: Value) -> Tensor:
    options = (step.get("alpha", 1e-4), step.get("beta", 0.75), step.get("bias", 1.0))
    return F.local_response_norm(to_tensor(x), step.get("size"), *options)


@implements("Softmax", "LogSoftmax")
def _softmax(step: Step, x: Value) -> Tensor:
    tensor = to_tensor(x)
    function = torch.softmax if step.op == "Softmax" else torch.log_softmax
    axis = step.get("axis", 1 if step.opset < 13 else -1) % tensor.ndim
    if step.opset < 13 and axis != tensor.ndim - 1:
        # Before opset 13 all axes from this one on are one.
        return function(tensor.flatten(axis), -1).reshape(tensor.shape)
    return function(tensor, axis)


_REDUCTIONS: dict[str, Any] = {
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keep),
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keep),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keep),
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keep),
    "ReduceL2": lambda x, axes, keep: (x * x).sum(axes, keep).sqrt(),
    "ReduceSumSquare": lambda x, axes, keep: (x * x).sum(axes, keep),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keep),
}


@implements(*_REDUCTIONS)
def _reduce(step: Step, x: Value, axes: Value = None) -> Tensor:
    tensor = to_tensor(x)
    along = step.option("axes", axes)
    if not along:
        if step.get("noop_with_empty_axes", 0):
            return tensor
        along = list(range(tensor.ndim))
    result: Tensor = _REDUCTIONS[step.op](tensor, along, bool(step.get("keepdims", 1)))
    return result


@implements("Upsample", "Resize")
def _resize(step: Step, x: Value, *rest: Value) -> Tensor:
    tensor = to_tensor(x)
    # Upsample, and Resize of opset 10, take scales alone; later ones a region of interest before and sizes behind.
    named = dict(zip(("scales",) if step.opset < 11 else ("roi", "scales", "sizes"), rest, strict=False))
    scales = step.option("scales", named.get("scales")) or None
    sizes = None if named.get("sizes") is None else step.known(named["sizes"], "sizes")
    if step.get("axes") is not None or step.get("antialias", 0):
        raise step.refuse("axes or antialias; expected neither")
    if step.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise step.refuse("keep_aspect_ratio_policy; expected stretch")
    if (sizes is None) == (scales is None):
        raise step.refuse("neither or both of scales and sizes")
    if scales is not None and [*map(float, scales[:2])] != [1.0, 1.0]:
        raise step.refuse(f"scales {scales} change the batch or the channels")
    coordinates = step.get(
        "coordinate_transformation_mode", "half_pixel" if step.opset > 10 else "asymmetric"
    )
    if step.get("mode", "nearest") == "nearest":
        return _nearest(step, tensor, scales, sizes, coordinates)
    modes = {"linear": ("linear", "bilinear", "trilinear"), "cubic": ("", "bicubic", "")}
    mode = modes[step.get("mode")][tensor.ndim - 3]
    if mode == "bicubic" and step.get("cubic_coeff_a", -0.75) != -0.75:
        raise step.refuse("cubic_coeff_a; expected -0.75")
    if coordinates not in ("half_pixel", "pytorch_half_pixel", "align_corners") or not mode:
        raise step.refuse(f"mode {step.get('mode')} with {coordinates}; expected half_pixel or align_corners")
    corners = coordinates == "align_corners"
    if sizes is not None:
        return F.interpolate(tensor, size=list(sizes[2:]), mode=mode, align_corners=corners)
    return F.interpolate(tensor, scale_factor=(scales or [])[2:], mode=mode, align_corners=corners)


def _nearest(
    step: Step, x: Tensor, scales: list[Any] | None, sizes: list[Any] | None, coordinates: str
) -> Tensor:
    """Pick the nearest value along each axis, at the coordinates that ONNX defines."""
    rounding = step.get("nearest_mode", "round_prefer_floor" if step.opset > 10 else "floor")
    whole = scales is not None and all(float(scale).is_integer() for scale in scales[2:])
    if whole and coordinates == "asymmetric" and rounding == "floor":
        return F.interpolate(x, scale_factor=[float(scale) for scale in (scales or [])[2:]], mode="nearest")
    for axis in range(2, x.ndim):
        extent = x.shape[axis]
        if not isinstance(extent, int) or (sizes is not None and not isinstance(sizes[axis], int)):
            raise step.refuse("a nearest resize of a size that is not known")
        goal = sizes[axis] if sizes is not None else math.floor(extent * (scales or [])[axis])
        scale = goal / extent if sizes is not None else (scales or [])[axis]
        place = np.arange(goal, dtype=np.float64)
        if coordinates in ("half_pixel", "pytorch_half_pixel"):
            place = (place + 0.5) / scale - 0.5 if goal > 1 or coordinates == "half_pixel" else place * 0
        elif coordinates == "asymmetric":
            place = place / scale
        elif coordinates == "align_corners":
            place = place * (extent - 1) / max(1, goal - 1)
        else:
            raise step.refuse(f"coordinates {coordinates}; expected half_pixel, asymmetric or align_corners")
        round_: Any = {
            "round_prefer_floor": lambda v: np.ceil(v - 0.5), "round_prefer_ceil": lambda v: np.floor(v + 0.5),
            "floor": np.floor, "ceil": np.ceil,
        }[rounding]  # fmt: skip
        chosen = np.clip(round_(place), 0, extent - 1).astype(np.int64)
        x = x.index_select(axis, torch.from_numpy(chosen))
    return x
