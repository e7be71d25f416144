"""Converters of ATen operations that work value by value."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from cat_plugin.errors import ExportError
from cat_plugin.graph.onnx.writer import CONVERTERS, Converter, Writer, converts

__all__: list[str] = []

_UNARY = {
    "relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "exp": "Exp", "log": "Log", "sqrt": "Sqrt",
    "reciprocal": "Reciprocal", "abs": "Abs", "neg": "Neg", "erf": "Erf", "floor": "Floor", "ceil": "Ceil",
    "round": "Round", "sin": "Sin", "cos": "Cos", "sign": "Sign", "softplus": "Softplus", "mish": "Mish",
    "hardswish": "HardSwish", "selu": "Selu", "isnan": "IsNaN",
}  # fmt: skip
_BINARY = {
    "maximum.default": "Max", "minimum.default": "Min",
    "pow.Tensor_Scalar": "Pow", "pow.Tensor_Tensor": "Pow", "pow.Scalar": "Pow",
}  # fmt: skip
_COMPARED = {"eq": "Equal", "gt": "Greater", "ge": "GreaterOrEqual", "lt": "Less", "le": "LessOrEqual"}
_SAME = (
    "clone", "contiguous", "alias", "detach", "dropout", "dropout_", "feature_dropout", "lift_fresh_copy", "detach_",
)  # fmt: skip


def _unary(op: str) -> Converter:
    def convert(writer: Writer, node: Node, given: dict[str, Any]) -> str:
        first = next(iter(given.values()))
        return writer.emit(op, [writer.value(first, None if op == "IsNaN" else node.meta["val"].dtype)])

    return convert


def _binary(op: str) -> Converter:
    def convert(writer: Writer, node: Node, given: dict[str, Any]) -> str:
        dtype = node.meta["val"].dtype
        first, second = list(given.values())[:2]
        return writer.emit(op, [writer.value(first, dtype), writer.value(second, dtype)])

    return convert


def _compared(op: str) -> Converter:
    def convert(writer: Writer, node: Node, given: dict[str, Any]) -> str:
        values = [item.meta["val"] if isinstance(item, Node) else item for item in list(given.values())[:2]]
        dtype = torch.result_type(*values)
        names = [writer.value(item, dtype) for item in list(given.values())[:2]]
        return writer.emit(op, names)

    return convert


for _name, _op in _UNARY.items():
    CONVERTERS[f"aten.{_name}.default"] = _unary(_op)
for _name, _op in _BINARY.items():
    CONVERTERS[f"aten.{_name}"] = _binary(_op)
for _name, _op in _COMPARED.items():
    CONVERTERS.update({f"aten.{_name}.{kind}": _compared(_op) for kind in ("Tensor", "Scalar")})
for _name in _SAME:
    CONVERTERS[f"aten.{_name}.default"] = lambda writer, node, given: writer.value(next(iter(given.values())))


@converts("aten.add.Tensor", "aten.add.Scalar", "aten.sub.Tensor", "aten.sub.Scalar")
@converts("aten.rsub.Scalar", "aten.rsub.Tensor")
def _sum(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    dtype = node.meta["val"].dtype
    first, second = (writer.value(given[name], dtype) for name in ("self", "other"))
    name, factor = str(node.target), given.get("alpha", 1)
    if "rsub" in name:
        first, second = second, first
    if factor != 1:
        # alpha multiplies what is added or taken away, which is the second operand by now, also of rsub
        second = writer.emit("Mul", [second, writer.value(factor, dtype)])
    return writer.emit("Add" if ".add." in name else "Sub", [first, second])


@converts("aten.div.Tensor", "aten.div.Scalar", "aten.div.Tensor_mode", "aten.div.Scalar_mode")
@converts("aten.true_divide.Tensor", "aten.floor_divide.default")
def _quotient(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    dtype = node.meta["val"].dtype
    mode = "floor" if "floor_divide" in str(node.target) else given.get("rounding_mode")
    first, second = (writer.value(given[name], dtype) for name in ("self", "other"))
    if not dtype.is_floating_point:
        # ONNX cuts off what is behind the point; its Mod has the sign of the divisor
        if mode == "floor":
            first = writer.emit("Sub", [first, writer.emit("Mod", [first, second])])
        return writer.emit("Div", [first, second])
    result = writer.emit("Div", [first, second])
    if mode == "trunc":
        sign, size = writer.emit("Sign", [result]), writer.emit("Floor", [writer.emit("Abs", [result])])
        return writer.emit("Mul", [sign, size])
    return writer.emit("Floor", [result]) if mode == "floor" else result


@converts("aten.clamp.default", "aten.clamp_min.default", "aten.clamp_max.default", "aten.hardtanh.default")
@converts("aten.relu6.default", "aten.clamp.Tensor")
def _clip(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    dtype = node.meta["val"].dtype
    low, high = given.get("min", given.get("min_val")), given.get("max", given.get("max_val"))
    if "relu6" in str(node.target):
        low, high = 0, 6
    limits = ["" if limit is None else writer.value(limit, dtype) for limit in (low, high)]
    if ".Tensor" in str(node.target) or any("quantize_per" in str(user.target) for user in node.users):
        # Clip takes numbers, and ONNX Runtime fuses a Clip with what quantizes behind it, and fails where that is not 8 bits.
        name = writer.value(given["self"], dtype)
        name = name if not limits[0] else writer.emit("Max", [name, limits[0]])
        return name if not limits[1] else writer.emit("Min", [name, limits[1]])
    return writer.emit("Clip", [writer.value(given["self"], dtype), *limits])


@converts("aten.bucketize.Tensor")
def _bucketize(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    """How many of the borders a value has reached, or passed."""
    dtype = given["self"].meta["val"].dtype
    last = writer.constant(np.array([-1], np.int64), "axes")
    values = writer.emit("Unsqueeze", [writer.value(given["self"], dtype), last])
    reached = "GreaterOrEqual" if given["right"] else "Greater"
    counted = writer.cast(
        writer.emit(reached, [values, writer.value(given["boundaries"], dtype)]), torch.int64
    )
    return writer.emit("ReduceSum", [counted, last], keepdims=0)


@converts("aten.index.Tensor")
def _looked_up(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    """Entries along one axis."""
    by = [(axis, each) for axis, each in enumerate(given["indices"]) if each is not None]
    if len(by) != 1 or by[0][1].meta["val"].dtype is torch.bool:
        raise ExportError("an index by several tensors, or by a mask; index one axis by integers")
    (axis, entries), source = by[0], writer.value(given["self"])
    return writer.emit("Gather", [source, writer.value(entries)], axis=axis)


@converts("aten.silu.default")
def _silu(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    x = writer.value(given["self"])
    return writer.emit("Mul", [x, writer.emit("Sigmoid", [x])])


@converts("aten.gelu.default")
def _gelu(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    return writer.emit("Gelu", [writer.value(given["self"])], approximate=str(given["approximate"]))


@converts("aten.rsqrt.default")
def _rsqrt(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    return writer.emit("Reciprocal", [writer.emit("Sqrt", [writer.value(given["self"])])])


@converts("aten.hardsigmoid.default")
def _hardsigmoid(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    return writer.emit("HardSigmoid", [writer.value(given["self"])], alpha=1 / 6, beta=0.5)


@converts("aten.leaky_relu.default")
def _leaky_relu(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    return writer.emit("LeakyRelu", [writer.value(given["self"])], alpha=float(given["negative_slope"]))


@converts("aten.elu.default")
def _elu(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    x = writer.value(given["self"])
    if given["scale"] == 1 and given["input_scale"] == 1:
        return writer.emit("Elu", [x], alpha=float(given["alpha"]))
    if given["input_scale"] == 1:
        return writer.emit("Selu", [x], alpha=float(given["alpha"]), gamma=float(given["scale"]))
    raise ExportError("input_scale must be 1")


@converts("aten.prelu.default", "aten._prelu_kernel.default")
def _prelu(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    source, slope = given["self"], given["weight"]
    name = writer.value(slope)
    rank, extent = source.meta["val"].ndim, int(slope.meta["val"].numel())
    if slope.meta["val"].ndim == 1 and rank > 1:
        name = writer.emit("Reshape", [name, writer.integers([extent, *[1] * (rank - 2)])])
    return writer.emit("PRelu", [writer.value(source), name])


@converts("aten.mul.Tensor", "aten.mul.Scalar")
def _product(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    dtype = node.meta["val"].dtype
    names = [writer.value(given[name], dtype) for name in ("self", "other")]
    return writer.emit("And" if dtype is torch.bool else "Mul", names)


def _logical(op: str, by_bits: bool) -> Converter:
    """Of truth values; of the bits of integers where `by_bits`."""

    def convert(writer: Writer, node: Node, given: dict[str, Any]) -> str:
        dtype = node.meta["val"].dtype if by_bits else torch.bool
        names = [writer.value(item, dtype) for item in list(given.values())[: 1 if op == "Not" else 2]]
        return writer.emit(op if dtype is torch.bool else f"Bitwise{op}", names)

    return convert


for _name, _op in {"and": "And", "or": "Or", "xor": "Xor", "not": "Not"}.items():
    CONVERTERS[f"aten.logical_{_name}.default"] = _logical(_op, by_bits=False)
    for _kind in ("default",) if _op == "Not" else ("Tensor", "Scalar"):
        CONVERTERS[f"aten.bitwise_{_name}.{_kind}"] = _logical(_op, by_bits=True)


@converts("aten.ne.Tensor", "aten.ne.Scalar")
def _unequal(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    return writer.emit("Not", [_compared("Equal")(writer, node, given)])


@converts("aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf")
def _where(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    dtype = node.meta["val"].dtype
    names = [writer.value(given[name], dtype) for name in ("self", "other")]
    return writer.emit("Where", [writer.value(given["condition"], torch.bool), *names])


@converts("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def _masked_fill(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    dtype = node.meta["val"].dtype
    names = [writer.value(given["mask"], torch.bool), writer.value(given["value"], dtype)]
    return writer.emit("Where", [*names, writer.value(given["self"], dtype)])


@converts("aten.to.dtype", "aten._to_copy.default", "aten.to.dtype_layout", "aten.to.device")
def _cast(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    return writer.value(given["self"], node.meta["val"].dtype)


@converts("aten.log1p.default")
def _log1p(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    x = writer.value(given["self"])
    return writer.emit("Log", [writer.emit("Add", [x, writer.value(1.0, node.meta["val"].dtype)])])


@converts("aten.log2.default", "aten.log10.default")
def _log_to_base(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    base = 10 if "log10" in str(node.target) else 2
    factor = writer.value(1 / math.log(base), node.meta["val"].dtype)
    return writer.emit("Mul", [writer.emit("Log", [writer.value(given["self"])]), factor])


@converts("aten.remainder.Tensor", "aten.remainder.Scalar")
def _remainder(writer: Writer, node: Node, given: dict[str, Any]) -> str:
    """With the sign of the divisor, as ONNX's Mod has it for integers."""
    dtype = node.meta["val"].dtype
    x, by = (writer.value(given[name], dtype) for name in ("self", "other"))
    if not dtype.is_floating_point:
        return writer.emit("Mod", [x, by])
    rest, zero = writer.emit("Mod", [x, by], fmod=1), writer.value(0.0, dtype)
    turned = writer.emit("Less", [writer.emit("Mul", [rest, writer.emit("Sign", [by])]), zero])
    return writer.emit("Where", [turned, writer.emit("Add", [rest, by]), rest])
