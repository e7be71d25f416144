"""QDQ operations as QuantizeLinear and DequantizeLinear, and the cluster-affine step, written as ONNX."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.fx import Node

from cat_plugin.cluster_affine import AffineParameters
from cat_plugin.cluster_affine.families import MAPS
from cat_plugin.errors import ExportError
from cat_plugin.graph.onnx.files import need
from cat_plugin.graph.onnx.step import write_step
from cat_plugin.graph.onnx.writer import Writer, converts

__all__ = ["storage_bits"]

#: Bits of the types that hold quantized values, and the first opset whose Q and DQ take them.
_SINCE = {2: 25, 4: 21, 8: 13}


def storage_bits(low: int, high: int, opset: int) -> int:
    """Bits of the narrowest type of an opset that holds the integers from `low` to `high`.

    Raises
    ------
    ExportError
        When they need more than 8 bits.
    """
    for bits, since in _SINCE.items():
        least, greatest = _range(bits, low < 0)
        if opset >= since and least <= low and high <= greatest:
            return bits
    raise ExportError(f"the integers {low} to {high}; expected a range of 8 bits or fewer")


def _range(bits: int, signed: bool) -> tuple[int, int]:
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def _integers(values: Any, low: int, high: int, opset: int) -> np.ndarray[Any, Any]:
    """Integers in the narrowest type that holds the range."""
    import ml_dtypes

    bits, signed = storage_bits(low, high, opset), low < 0
    plain = np.asarray(values).astype(np.int8 if signed else np.uint8)
    if bits == 8:
        return plain
    return plain.astype(getattr(ml_dtypes, f"{'' if signed else 'u'}int{bits}"))


def _values(writer: Writer, item: Any) -> np.ndarray[Any, Any]:
    return np.asarray(writer.tensor(item).numpy() if isinstance(item, Node) else item)


class _Grid:
    """Scale and zero point of one QDQ operation, with their range."""

    def __init__(self, writer: Writer, given: dict[str, Any]) -> None:
        scale = given.get("scale", given.get("scales"))
        zero = given.get("zero_point", given.get("zero_points"))
        self.low, self.high = int(given["quant_min"]), int(given["quant_max"])
        self.scale = _values(writer, scale).astype(np.float32)
        self.zero = np.zeros_like(self.scale) if zero is None else _values(writer, zero)
        if self.scale.ndim == 1 and self.scale.size == 1 and "axis" not in given:
            self.scale, self.zero = self.scale.reshape(()), self.zero.reshape(())
        if self.zero.min() < self.low or self.zero.max() > self.high:
            raise ExportError(
                f"a zero point outside of {self.low} to {self.high}, which ONNX's types cannot hold"
            )
        self.axis: dict[str, Any] = {"axis": int(given["axis"])} if "axis" in given else {}

    def names(self, writer: Writer, values: Any) -> list[str]:
        """Of scale and zero point, in the type that `values` on this grid have."""
        low, high, zero = self.low, self.high, self.zero
        if self._unsigned(writer, values):
            low, high, zero = low + 128, high + 128, zero + 128
        return [
            writer.constant(self.scale, "scale"),
            writer.constant(_integers(zero, low, high, writer.opset), "zero_point"),
        ]

    def _unsigned(self, writer: Writer, values: Any) -> bool:
        """Whether signed bytes that the graph computes are written as unsigned ones, the same values 128 further up.

        ONNX Runtime 1.32 turns the former into the latter itself, and then cannot load files of opset 21 on in which it moved them behind
        a reshape.  Symmetric ones stay: TensorRT takes zero points of 0 alone.
        """
        bits = storage_bits(self.low, self.high, writer.opset)
        signed = self.low < 0 and bits == 8 and not self.axis and not writer.is_constant(values)
        return signed and not writer.signed


@converts(
    "quantized_decomposed.quantize_per_tensor.default", "quantized_decomposed.quantize_per_tensor.tensor"
)
@converts("quantized_decomposed.quantize_per_channel.default")
def _quantize(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    grid = _Grid(writer, given)
    source = writer.value(given["input"], torch.float32)
    bits = storage_bits(grid.low, grid.high, writer.opset)
    if (grid.low, grid.high) != _range(bits, grid.low < 0):
        # The type holds more integers than the range has: clipped before, at values that are on the grid.
        if grid.axis:
            raise ExportError(
                f"activations quantized by channel to {grid.low}..{grid.high}; expected 8 or 4 bits"
            )
        limits = [
            writer.constant(np.float32((edge - grid.zero) * grid.scale), "limit")
            for edge in (grid.low, grid.high)
        ]
        # Min and Max: ONNX Runtime fuses a Clip with what quantizes behind it, and fails where that is not 8 bits.
        source = writer.emit("Max", [writer.emit("Min", [source, limits[1]]), limits[0]])
    return writer.emit("QuantizeLinear", [source, *grid.names(writer, node)], **grid.axis)


@converts(
    "quantized_decomposed.dequantize_per_tensor.default", "quantized_decomposed.dequantize_per_tensor.tensor"
)
@converts("quantized_decomposed.dequantize_per_channel.default")
def _dequantize(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    grid = _Grid(writer, given)
    source = given["input"]
    if writer.is_constant(source):
        integers = _integers(writer.tensor(source).numpy(), grid.low, grid.high, writer.opset)
        name = writer.fresh(f"{source.name.removeprefix('p_').removeprefix('b_')}_integers")
        writer.initializers.append(need("onnx").numpy_helper.from_array(integers, name))
    else:
        name = writer.value(source)
    return writer.emit("DequantizeLinear", [name, *grid.names(writer, source)], **grid.axis)


@converts("quantized_decomposed.dequantize_per_channel_group.default")
def _dequantize_groups(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    low, high = int(given["quant_min"]), int(given["quant_max"])
    scales = writer.tensor(given["scales"])
    zeros = torch.zeros_like(scales) if given["zero_points"] is None else writer.tensor(given["zero_points"])
    weight = writer.tensor(given["input"])
    names = [
        writer.constant(_integers(weight.numpy(), low, high, writer.opset), "weight_integers"),
        writer.constant(scales.reshape(len(weight), -1).float().numpy(), "scale"),
        writer.constant(
            _integers(zeros.reshape(len(weight), -1).numpy(), low, high, writer.opset), "zero_point"
        ),
    ]
    return writer.emit("DequantizeLinear", names, axis=1, block_size=int(given["group_size"]))


@converts("quantized_decomposed.quantize_per_token.default")
def _quantize_tokens(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    """ONNX's operators take constant scales along one axis: these are arithmetic instead, with the same rounding."""
    source, scales, zeros = (
        writer.value(given[n], torch.float32) for n in ("input", "scales", "zero_points")
    )
    ratio = writer.emit("Mul", [source, writer.emit("Reciprocal", [scales])])
    limits = [writer.constant(np.float32(given[n]), "limit") for n in ("quant_min", "quant_max")]
    rounded = writer.emit("Round", [writer.emit("Add", [ratio, zeros])])
    return writer.cast(writer.emit("Clip", [rounded, *limits]), node.meta["val"].dtype)


@converts("quantized_decomposed.dequantize_per_token.default")
def _dequantize_tokens(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    source, scales, zeros = (
        writer.value(given[n], torch.float32) for n in ("input", "scales", "zero_points")
    )
    return writer.emit("Mul", [writer.emit("Sub", [source, zeros]), scales])


@converts("cat")
def _cluster_affine(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    operation = str(node.target).split(".")[1]
    applied = next((known for known in MAPS.values() if known.op == operation), None)
    if applied is None:
        raise ExportError("no map family has this op; register the family before exporting")
    arrays = {name: writer.tensor(given[name]).double().numpy() for name in applied.arrays}
    parameters = AffineParameters(mode=applied.mode, alpha=float(given["alpha"]), **arrays)
    features = given.get("features")
    logits = writer.value(given["logits"], torch.float32)
    result = write_step(
        writer, parameters, logits, None if features is None else writer.value(features, torch.float32)
    )
    dtype = node.meta["val"].dtype
    return result if dtype is torch.float32 else writer.cast(result, dtype)
