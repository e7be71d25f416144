"""Converters of ATen operations that reduce, contract or normalise: layers, poolings, attention."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from cat_plugin.errors import ExportError
from cat_plugin.graph.onnx.quantizers import storage_bits
from cat_plugin.graph.onnx.writer import CONVERTERS, Writer, arguments_of, converts

__all__: list[str] = []


def _coarse(*operands: Node) -> bool:
    """Whether a layer computes with integers of fewer than 8 bits.

    ONNX Runtime rounds a bias inside of such a layer to a multiple of the product of the two scales, which is a large
    step at 4 bits (3 % of the largest logit in a small ResNet). A bias that is added behind the layer stays as it is.
    """
    for operand in operands:
        if "quantized_decomposed.dequantize" in str(operand.target):
            given = arguments_of(operand)
            if storage_bits(int(given["quant_min"]), int(given["quant_max"]), 21) < 8:
                return True
    return False


def _each(value: Any, count: int) -> list[int]:
    """One number for each spatial axis."""
    values = list(value) if isinstance(value, Sequence) else [value]
    return values * count if len(values) == 1 else values


@converts("aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default", "aten.convolution.default")
@converts("aten.conv1d.padding", "aten.conv2d.padding", "aten.conv3d.padding")
@converts("aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input")
def _convolution(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    weight = given["weight"].meta["val"]
    spatial = weight.ndim - 2
    bias = given["bias"]
    apart = bias is not None and _coarse(given["input"], given["weight"])
    names = [writer.value(given[n]) for n in ("input", "weight", "bias") if given[n] is not None]
    attributes: dict[str, Any] = {
        "strides": _each(given["stride"], spatial),
        "dilations": _each(given["dilation"], spatial),
        "group": given["groups"],
        "kernel_shape": [int(extent) for extent in weight.shape[2:]],
    }
    padding = given["padding"]
    if padding == "valid":
        padding = 0
    if padding == "same":
        reach = [
            d * (k - 1)
            for d, k in zip(attributes["dilations"], attributes["kernel_shape"], strict=True)
        ]  # fmt: skip
        attributes["pads"] = [r // 2 for r in reach] + [r - r // 2 for r in reach]
    else:
        attributes["pads"] = _each(padding, spatial) * 2
    op = "Conv"
    if "conv_transpose" in str(node.target) or given.get("transposed"):
        attributes["output_padding"] = _each(given["output_padding"], spatial)
        op = "ConvTranspose"
    if not apart:
        return writer.emit(op, names, **attributes)
    along = writer.emit("Reshape", [names[2], writer.integers([-1, *[1] * spatial])])
    return writer.emit("Add", [writer.emit(op, names[:2], **attributes), along])


@converts("aten.linear.default")
def _linear(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    source, weight, bias = given["input"], given["weight"], given["bias"]
    if source.meta["val"].ndim == 2 and not _coarse(source, weight):
        names = [writer.value(item) for item in (source, weight, bias) if item is not None]
        return writer.emit("Gemm", names, transB=1)
    turned = writer.emit("Transpose", [writer.value(weight)], perm=[1, 0])
    result = writer.emit("MatMul", [writer.value(source), turned])
    return result if bias is None else writer.emit("Add", [result, writer.value(bias)])


@converts("aten.addmm.default")
def _addmm(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    names = [writer.value(given[name]) for name in ("mat1", "mat2", "self")]
    return writer.emit("Gemm", names, alpha=float(given["alpha"]), beta=float(given["beta"]))


@converts("aten.mm.default", "aten.bmm.default", "aten.matmul.default")
def _matmul(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    return writer.emit("MatMul", [writer.value(item) for item in list(given.values())[:2]])


def _pool(op: str, spatial: int) -> Any:
    def convert(writer: Writer, node: Node, given: dict[str, Any]) -> str:
        kernel = _each(given["kernel_size"], spatial)
        attributes: dict[str, Any] = {
            "kernel_shape": kernel,
            "strides": _each(given["stride"], spatial) if given["stride"] else kernel,
            "pads": _each(given["padding"], spatial) * 2,
            "ceil_mode": int(given["ceil_mode"]),
        }
        if op == "MaxPool":
            attributes["dilations"] = _each(given["dilation"], spatial)
        else:
            attributes["count_include_pad"] = int(given["count_include_pad"])
        divisor, source = given.get("divisor_override"), given["self"]
        if divisor is not None:
            if given["ceil_mode"]:
                raise ExportError("divisor_override with ceil_mode; pad the input instead")
            attributes["count_include_pad"] = 1
        if any(user.target is operator.getitem and user.args[1] == 1 for user in node.users):
            plane = math.prod(source.meta["val"].shape[-spatial:])
            writer.parts[node] = writer.emit_many(op, [writer.value(source)], 2, **attributes)
            # ONNX counts places through the whole tensor, torch in a channel
            writer.parts[node][1] = writer.emit(
                "Mod", [writer.parts[node][1], writer.value(plane, torch.int64)]
            )
            return writer.parts[node][0]
        name = writer.emit(op, [writer.value(source)], **attributes)
        if divisor is not None:
            factor = writer.value(math.prod(kernel) / divisor, node.meta["val"].dtype)
            name = writer.emit("Mul", [name, factor])
        writer.parts[node] = [name]
        return name

    return convert


for _spatial in (1, 2, 3):
    CONVERTERS[f"aten.max_pool{_spatial}d.default"] = _pool("MaxPool", _spatial)
    CONVERTERS[f"aten.max_pool{_spatial}d_with_indices.default"] = _pool("MaxPool", _spatial)
    CONVERTERS[f"aten.avg_pool{_spatial}d.default"] = _pool("AveragePool", _spatial)


@converts("aten.adaptive_avg_pool1d.default", "aten.adaptive_avg_pool2d.default")
@converts("aten._adaptive_avg_pool2d.default", "aten.adaptive_max_pool2d.default")
def _adaptive(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    source = given["self"]
    spatial = 1 if "1d" in str(node.target) else 2
    kind = "Max" if "max" in str(node.target) else "Average"
    goal = _each(given["output_size"], spatial)
    if all(size == 1 for size in goal):
        name = writer.emit(f"Global{kind}Pool", [writer.value(source)])
    else:
        extents = source.meta["val"].shape[-spatial:]
        if not all(isinstance(e, int) and e % g == 0 for e, g in zip(extents, goal, strict=True)):
            raise ExportError(
                f"adaptive pooling of {tuple(extents)} to {tuple(goal)}; expected sizes that divide"
            )
        step = [e // g for e, g in zip(extents, goal, strict=True)]
        name = writer.emit(f"{kind}Pool", [writer.value(source)], kernel_shape=step, strides=step)
    writer.parts[node] = [name]
    return name


def _reduce(op: str) -> Any:
    def convert(writer: Writer, node: Node, given: dict[str, Any]) -> str:
        axes = given.get("dim")
        axes = [axes] if isinstance(axes, int) else axes
        names = [writer.value(given["self"], node.meta["val"].dtype)]
        if axes:
            names.append(writer.integers(axes))
        return writer.emit(op, names, keepdims=int(bool(given.get("keepdim"))))

    return convert


for _name, _op in {
    "mean.dim": "ReduceMean", "mean.default": "ReduceMean", "sum.dim_IntList": "ReduceSum",
    "sum.default": "ReduceSum", "amax.default": "ReduceMax", "amin.default": "ReduceMin",
    "logsumexp.default": "ReduceLogSumExp", "prod.dim_int": "ReduceProd",
}.items():  # fmt: skip
    CONVERTERS[f"aten.{_name}"] = _reduce(_op)


@converts("aten.linalg_vector_norm.default")
def _norm(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    ops = {1.0: "ReduceL1", 2.0: "ReduceL2", math.inf: "ReduceMax", -math.inf: "ReduceMin"}
    op = ops.get(float(given["ord"]))
    if op is None:
        raise ExportError(f"the norm of order {given['ord']}; ONNX knows 1, 2 and the infinities")
    name = writer.value(given["self"], node.meta["val"].dtype)
    axes = [] if given["dim"] is None else [writer.integers(given["dim"])]
    return writer.emit(
        op,
        [writer.emit("Abs", [name]) if op in ("ReduceMax", "ReduceMin") else name, *axes],
        keepdims=int(given["keepdim"]),
    )


@converts(
    "aten.any.default", "aten.any.dim", "aten.any.dims", "aten.all.default", "aten.all.dim", "aten.all.dims"
)
def _some(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    """Whether any, or each, is true: the largest, or the least, of zeros and ones."""
    axes = given.get("dim")
    axes = [axes] if isinstance(axes, int) else axes
    name = writer.cast(writer.value(given["self"], torch.bool), torch.int32)
    names = [name] if axes is None else [name, writer.integers(axes)]
    op = "ReduceMax" if ".any." in str(node.target) else "ReduceMin"
    return writer.cast(writer.emit(op, names, keepdims=int(bool(given.get("keepdim")))), torch.bool)


@converts("aten.argmax.default", "aten.argmin.default")
def _extreme(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    if given["dim"] is None:
        raise ExportError("dim is not given")
    op = "ArgMax" if "argmax" in str(node.target) else "ArgMin"
    return writer.emit(op, [writer.value(given["self"])], axis=given["dim"], keepdims=int(given["keepdim"]))


@converts("aten.softmax.int", "aten._softmax.default", "aten.log_softmax.int", "aten._log_softmax.default")
def _softmax(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    op = "LogSoftmax" if "log_softmax" in str(node.target) else "Softmax"
    return writer.emit(op, [writer.value(given["self"], node.meta["val"].dtype)], axis=given["dim"])


@converts("aten.batch_norm.default", "aten._native_batch_norm_legit_no_training.default")
def _batch_norm(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    if given.get("training"):
        raise ExportError("batch statistics at inference; expected running statistics")
    mean, variance = given["running_mean"], given["running_var"]
    count = int(mean.meta["val"].numel())
    affine = [
        writer.value(given[name]) if given[name] is not None else writer.constant(fill.numpy(), name)
        for name, fill in (("weight", torch.ones(count)), ("bias", torch.zeros(count)))
    ]
    names = [writer.value(given["input"]), *affine, writer.value(mean), writer.value(variance)]
    name = writer.emit("BatchNormalization", names, epsilon=float(given["eps"]))
    writer.parts[node] = [name]
    return name


@converts("aten.layer_norm.default", "aten.native_layer_norm.default")
def _layer_norm(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    shape = [int(extent) for extent in given["normalized_shape"]]
    scale = (
        writer.value(given["weight"])
        if given["weight"] is not None
        else writer.constant(torch.ones(shape).numpy(), "weight")
    )
    names = [writer.value(given["input"]), scale]
    if given["bias"] is not None:
        names.append(writer.value(given["bias"]))
    name = writer.emit("LayerNormalization", names, axis=-len(shape), epsilon=float(given["eps"]))
    writer.parts[node] = [name]
    return name


@converts("aten.group_norm.default")
def _group_norm(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    source, groups = given["input"], given["num_groups"]
    shape = source.meta["val"].shape
    channels, rank = int(shape[1]), source.meta["val"].ndim
    grouped = writer.emit("Reshape", [writer.value(source), writer.integers([0, groups, -1])])
    ones, zeros = (
        writer.constant(fill.numpy(), "norm") for fill in (torch.ones(groups), torch.zeros(groups))
    )
    normal = writer.emit("InstanceNormalization", [grouped, ones, zeros], epsilon=float(given["eps"]))
    name = writer.emit("Reshape", [normal, writer.emit("Shape", [writer.value(source)])])
    for op, key in (("Mul", "weight"), ("Add", "bias")):
        if given[key] is not None:
            along = writer.integers([channels, *[1] * (rank - 2)])
            name = writer.emit(op, [name, writer.emit("Reshape", [writer.value(given[key]), along])])
    return name


@converts("aten.scaled_dot_product_attention.default")
def _attention(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    query, key, value, mask = given["query"], given["key"], given["value"], given["attn_mask"]
    groups = 1
    if given.get("enable_gqa"):
        groups = int(query.meta["val"].shape[-3]) // int(key.meta["val"].shape[-3])
    keys, values = (_repeated(writer, node, groups) for node in (key, value))
    width = query.meta["val"].shape[-1]
    scale = given["scale"] if given["scale"] is not None else 1 / math.sqrt(width)
    rank, dtype = key.meta["val"].ndim, node.meta["val"].dtype
    turned = writer.emit(
        "Transpose", [keys], perm=[*range(rank - 2), rank - 1, rank - 2]
    )  # fmt: skip
    scaled = writer.emit("Mul", [writer.value(query), writer.value(float(scale), dtype)])
    score = writer.emit("MatMul", [scaled, turned])
    if given["is_causal"]:
        sizes = writer.emit("Shape", [score], start=-2)
        hidden = writer.emit("Expand", [writer.value(-math.inf, dtype), sizes])
        behind = writer.constant(np.array(1, dtype=np.int64), "diagonal")
        score = writer.emit("Add", [score, writer.emit("Trilu", [hidden, behind], upper=1)])
    if mask is not None:
        held = writer.value(mask)
        if mask.meta["val"].dtype is torch.bool:
            limits = [writer.value(number, dtype) for number in (0.0, -math.inf)]
            held = writer.emit("Where", [held, *limits])
        score = writer.emit("Add", [score, held])
    return writer.emit("MatMul", [writer.emit("Softmax", [score], axis=-1), values])


def _repeated(writer: Writer, node: Node, groups: int) -> str:
    """Keys or values (N, H, T, D), each head for as many queries' heads as share it."""
    name = writer.value(node)
    if groups == 1:
        return name
    _, heads, _, width = node.meta["val"].shape
    apart = writer.emit("Reshape", [name, writer.integers([0, int(heads), 1, -1, int(width)])])
    several = writer.emit("Expand", [apart, writer.integers([1, 1, groups, 1, 1])])
    return writer.emit("Reshape", [several, writer.integers([0, int(heads) * groups, -1, int(width)])])


@converts("aten.upsample_nearest2d.vec", "aten.upsample_nearest1d.vec", "aten.upsample_bilinear2d.vec")
@converts("aten.upsample_nearest2d.default", "aten.upsample_bilinear2d.default")
def _resize(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    source = given["input"] if "input" in given else given["self"]
    sizes = node.meta["val"].shape[2:]
    if not all(isinstance(size, int) for size in sizes):
        raise ExportError("a resize to a size that is not known")
    nearest = "nearest" in str(node.target)
    if nearest:
        attributes = {
            "mode": "nearest",
            "coordinate_transformation_mode": "asymmetric",
            "nearest_mode": "floor",
        }
    else:
        corners = bool(given["align_corners"])
        mode = "align_corners" if corners else "half_pixel"
        attributes = {"mode": "linear", "coordinate_transformation_mode": mode}
    ratios = [size / extent for size, extent in zip(sizes, source.meta["val"].shape[2:], strict=True)]
    factors = given.get("scale_factors")
    if factors is not None and any(abs(f - r) > 1e-9 for f, r in zip(factors, ratios, strict=True)):
        raise ExportError("a scale_factor that does not give a whole size; give the size")
    # The batch keeps its size: the two leading scales are one.
    scales = writer.constant(torch.tensor([1.0, 1.0, *ratios]).numpy(), "scales")
    return writer.emit("Resize", [writer.value(source), "", scales], **attributes)


@converts("aten.var.correction", "aten.std.correction", "aten.var.dim", "aten.std.dim")
def _variance(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    source, dtype = given["self"], node.meta["val"].dtype
    axes = given["dim"] or list(range(source.meta["val"].ndim))
    extents = [source.meta["val"].shape[axis] for axis in axes]
    if not all(isinstance(extent, int) for extent in extents):
        raise ExportError("a variance over an axis whose size is not known")
    count = math.prod(extents)
    correction = given.get("correction", int(bool(given.get("unbiased", True))))
    correction = 1 if correction is None else correction
    x, along = writer.value(source), writer.integers(axes)
    centred = writer.emit("Sub", [x, writer.emit("ReduceMean", [x, along], keepdims=1)])
    squares = writer.emit(
        "ReduceSum", [writer.emit("Mul", [centred, centred]), along], keepdims=int(given["keepdim"])
    )
    result = writer.emit("Mul", [squares, writer.value(1 / max(1e-30, count - correction), dtype)])
    return writer.emit("Sqrt", [result]) if ".std" in str(node.target) else result
