"""Our own converters: ``quantized_decomposed`` and the ``cat`` operators, constants, and what TVM has none for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm import relax

from cat_plugin.errors import CompileError
from cat_plugin.graph.manifest import corrections
from tvm_backend import dialect
from tvm_backend.importer.honoured import where
from tvm_backend.kernels.spec import QParams

__all__ = ["CONVERTERS", "Converter"]

Converter = Callable[[Any, Any], Any]
"""Takes a node and the importer; returns the relax expression."""


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _argument(node: Any, position: int, name: str, default: Any = None) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def _scalar(value: Any, importer: Any) -> float:
    """A scale or zero point: a number, or a tensor of one element that is constant in the program."""
    if isinstance(value, int | float):
        return value
    tensor = importer.cat_constants.get(getattr(value, "name", None))
    if tensor is None or tensor.numel() != 1:
        raise CompileError(
            f"{getattr(value, 'name', value)!r} gives the scale or zero point of a tensor and is computed at run time; "
            "only statically quantized graphs can be compiled to integer kernels"
        )
    return float(tensor.item())


def _qparams(node: Any, importer: Any) -> QParams:
    scale = float(_scalar(_argument(node, 1, "scale"), importer))
    zero_point = int(_scalar(_argument(node, 2, "zero_point"), importer))
    qmin, qmax = int(_argument(node, 3, "quant_min")), int(_argument(node, 4, "quant_max"))
    dtype = _dtype_name(_argument(node, 5, "dtype"))
    return QParams(scale, zero_point, qmin, qmax, dtype)  # type: ignore[arg-type]


def _quantize_per_tensor(node: Any, importer: Any) -> Any:
    x = importer.env[node.args[0]]
    return importer.block_builder.emit(dialect.quantize(x, _qparams(node, importer)))


def _dequantize_per_tensor(node: Any, importer: Any) -> Any:
    x = importer.env[node.args[0]]
    return importer.block_builder.emit(dialect.dequantize(x, _qparams(node, importer)))


def _per_channel(node: Any, importer: Any, make: Callable[..., Any]) -> Any:
    x, scales, zero_points = (importer.env[arg] if arg is not None else None for arg in node.args[:3])
    if zero_points is None:
        raise CompileError(f"{where(node)}: per-channel quantization without zero points cannot be compiled")
    names = {"axis": "axis", "quant_min": "qmin", "quant_max": "qmax"}
    attributes: dict[str, Any] = {
        short: int(_argument(node, 3 + i, long)) for i, (long, short) in enumerate(names.items())
    }
    attributes["dtype"] = _dtype_name(_argument(node, 6, "dtype"))
    return importer.block_builder.emit(make(x, scales, zero_points, attributes))


def _dequantize_per_channel_group(node: Any, importer: Any) -> Any:
    """Rows of the weight are cut into their groups, each of which is a channel."""
    weight, scales, zero_points = (importer.env[arg] if arg is not None else None for arg in node.args[:3])
    if zero_points is None:
        raise CompileError(f"{where(node)}: quantization by group without zero points cannot be compiled")
    group, shape = int(_argument(node, 6, "group_size")), dialect.shape_of(weight)
    emit = importer.block_builder.emit
    rows = emit(relax.op.reshape(weight, [-1, group]))
    scale, zero = (emit(relax.op.reshape(values, [-1])) for values in (scales, zero_points))
    attributes = {"axis": 0, "qmin": int(node.args[3]), "qmax": int(node.args[4])}
    wide = emit(dialect.dequantize_per_channel(rows, scale, zero, attributes))
    return emit(relax.op.reshape(wide, shape))


def _per_token(node: Any, importer: Any, make: Callable[..., Any]) -> Any:
    x, scales, zero_points = (importer.env[arg] for arg in node.args[:3])
    attributes: dict[str, Any] = {"qmin": int(node.args[3]), "qmax": int(node.args[4])}
    attributes["dtype"] = _dtype_name(_argument(node, 5, "dtype"))
    return importer.block_builder.emit(make(x, scales, zero_points, attributes))


def _correction(name: str) -> Converter:
    def convert(node: Any, importer: Any) -> Any:
        operands, alpha = list(node.args), node.kwargs.get("alpha")
        if alpha is None:
            alpha = operands.pop()
        tensors = [importer.env[arg] for arg in operands if arg is not None]
        features = corrections()[name].takes_features and operands[1] is not None
        return importer.block_builder.emit(dialect.correction(name, tensors, alpha, features))

    return convert


def _constant(node: Any, importer: Any) -> Any:
    tensor = node.meta["constant"]
    return importer.block_builder.emit(relax.const(tensor.numpy(), _dtype_name(tensor.dtype)))


def _reduced(reduce: Any) -> Converter:
    def convert(node: Any, importer: Any) -> Any:
        dims, keep = _argument(node, 1, "dim", ()), bool(_argument(node, 2, "keepdim", False))
        dims = [dims] if isinstance(dims, int) else list(dims)
        return importer.block_builder.emit(reduce(importer.env[node.args[0]], dims or None, keepdims=keep))

    return convert


_REDUCTIONS = {"sum": "add", "prod": "mul", "amax": "max", "amin": "min"}


def _scattered(node: Any, importer: Any) -> Any:
    """Sums, products or extremes of what is at a place and what is written there."""
    x, index, source = (importer.env[node.args[i]] for i in (0, 2, 3))
    how = _REDUCTIONS.get(_argument(node, 4, "reduce", "sum"))
    if how is None or not _argument(node, 5, "include_self", True):
        raise CompileError(
            f"{node.target} ({where(node)}): expected sum, prod, amax or amin, what is there included; write it by these"
        )
    axis = int(node.args[1])
    return importer.block_builder.emit(relax.op.scatter_elements(x, index, source, axis, how))


CONVERTERS: dict[str, Converter] = {
    "constant": _constant,
    "amax.default": _reduced(relax.op.max),
    "amin.default": _reduced(relax.op.min),
    "prod.dim_int": _reduced(relax.op.prod),
    "scatter_add.default": _scattered,
    "scatter_reduce.two": _scattered,
    "quantize_per_tensor.default": _quantize_per_tensor,
    "quantize_per_tensor.tensor": _quantize_per_tensor,
    "dequantize_per_tensor.default": _dequantize_per_tensor,
    "dequantize_per_tensor.tensor": _dequantize_per_tensor,
    "quantize_per_channel.default": partial(_per_channel, make=dialect.quantize_per_channel),
    "dequantize_per_channel.default": partial(_per_channel, make=dialect.dequantize_per_channel),
    "dequantize_per_channel_group.default": _dequantize_per_channel_group,
    "quantize_per_token.default": partial(_per_token, make=dialect.quantize_per_token),
    "dequantize_per_token.default": partial(_per_token, make=dialect.dequantize_per_token),
    **{f"{name}.default": _correction(name) for name in dialect.CORRECTIONS},
}
