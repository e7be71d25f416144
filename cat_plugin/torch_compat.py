"""Everything that is taken from PyTorch's private parts, nowhere else, with what stands in where a release lacks it.

``torch.ao`` is to be deleted in favour of torchao.  A graph that is handed over needs of it only the operations
``quantized_decomposed.*``; they are registered here, with the same schemas and the same results to the bit, where torch
brings none.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.graph import _PyTreeCodeGen as PyTreeCodeGen
from torch.fx.graph import _PyTreeInfo as PyTreeInfo
from torch.utils import _pytree as pytree

__all__ = [
    "NATIVE_FUNCTIONS",
    "PACKED_MODULES",
    "QUANTIZED_MODULES",
    "OpOverload",
    "PyTreeCodeGen",
    "PyTreeInfo",
    "bytes_multiply_fast",
    "define_quantized_decomposed",
    "linear_packed_parameters",
    "product_of_bytes",
    "pytree",
    "quantized_tensor",
    "register_quantized_decomposed",
    "schema_of",
    "without_stack_traces",
]

OpOverload = torch._ops.OpOverload

product_of_bytes = torch._int_mm
"""Of two int8 matrices, int32: torch has no public product of integers that is fast."""


def bytes_multiply_fast() -> bool:
    """Whether :data:`product_of_bytes` is faster on this processor than a product of floats.

    Without VNNI torch takes a plain loop: 2.5 operations a nanosecond where floats have 50 (AMD EPYC, Zen 3, one core).
    """
    return bool(getattr(torch.cpu, "_is_vnni_supported", lambda: False)())


NATIVE_FUNCTIONS = torch._C._nn
"""Functions of torch that are written in C++ and have names in a traced graph, such as ``gelu``."""

QUANTIZED_MODULES = "torch.ao.nn."
"""Where the classes of torch's quantized layers live."""

PACKED_MODULES = ("torch.ao.nn.quantized.", "torch.ao.nn.intrinsic.quantized.")
"""Where those live that hold their weight packed for int8 kernels."""

_NAMESPACE = "quantized_decomposed"
_GRID = "int quant_min, int quant_max, ScalarType dtype"
_WIDEN = "*, ScalarType? out_dtype=None"
_SCHEMAS = (
    f"quantize_per_tensor(Tensor input, float scale, int zero_point, {_GRID}) -> Tensor",
    f"quantize_per_tensor.tensor(Tensor input, Tensor scale, Tensor zero_point, {_GRID}) -> Tensor",
    f"dequantize_per_tensor(Tensor input, float scale, int zero_point, {_GRID}, {_WIDEN}) -> Tensor",
    f"dequantize_per_tensor.tensor(Tensor input, Tensor scale, Tensor zero_point, {_GRID}, {_WIDEN}) -> Tensor",
    f"quantize_per_channel(Tensor input, Tensor scales, Tensor zero_points, int axis, {_GRID}) -> Tensor",
    f"dequantize_per_channel(Tensor input, Tensor scales, Tensor? zero_points, int axis, {_GRID}, {_WIDEN}) -> Tensor",
    f"dequantize_per_channel_group(Tensor input, Tensor scales, Tensor? zero_points, {_GRID}, int group_size, "
    "ScalarType output_dtype) -> Tensor",
    f"quantize_per_token(Tensor input, Tensor scales, Tensor zero_points, {_GRID}) -> Tensor",
    f"dequantize_per_token(Tensor input, Tensor scales, Tensor zero_points, {_GRID}, ScalarType output_dtype) -> Tensor",
)
_libraries: list[torch.library.Library] = []  # a library's operations go when it is collected


@contextmanager
def without_stack_traces() -> Iterator[None]:
    """Meanwhile graphs are made without the lines of code that their nodes come from.

    Nobody reads them here, and looking them up is a quarter of the time that rewriting a program takes.
    """
    config: Any = fx.config
    before = getattr(config, "do_not_emit_stack_traces", False)
    config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        config.do_not_emit_stack_traces = before


def schema_of(target: Any) -> Any:
    """The schema of an operation of torch; None for any other callable."""
    return getattr(target, "_schema", None)


def quantized_tensor(values: Tensor, scales: Tensor, zero_points: Tensor, axis: int) -> Tensor:
    """A tensor of torch's own quantized type.

    Parameters
    ----------
    values : Tensor
        Integers of any shape.
    scales, zero_points : Tensor
        One number, or one for each index of `axis`.
    axis : int
        The axis of the channels; below 0 where there is one scale.
    """
    if axis >= 0:
        return torch._make_per_channel_quantized_tensor(values, scales, zero_points, axis)
    return torch._make_per_tensor_quantized_tensor(values, float(scales), int(zero_points))


def linear_packed_parameters() -> Any:
    """Empty packed int8 parameters of a quantized linear layer of torch's."""
    return importlib.import_module("torch.ao.nn.quantized.modules.linear").LinearPackedParams(torch.qint8)


def register_quantized_decomposed() -> None:
    """Make ``torch.ops.quantized_decomposed`` there: torch's where it has one, else what is defined here."""
    if hasattr(torch.ops.quantized_decomposed, "quantize_per_tensor"):
        return
    try:
        importlib.import_module("torch.ao.quantization.fx._decomposed")
    except ImportError:
        define_quantized_decomposed()


def define_quantized_decomposed() -> None:
    """Register the operations of a QDQ graph, as a fragment, so that a package that owns the namespace may follow."""
    library: Any = torch.library.Library(_NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        library.define(schema)
        name = schema.partition("(")[0]
        compute = _COMPUTE[name.partition(".")[0]]
        library.impl(name, compute, "CompositeExplicitAutograd")
        library.impl(
            name, _FAKE.get(name, _fake_dequantize if name.startswith("de") else _fake_quantize), "Meta"
        )
    _libraries.append(library)


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _check_input(x: Tensor) -> Tensor:
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.to(torch.float32)
    if x.dtype != torch.float32:
        raise TypeError(f"a tensor of dtype {x.dtype} was given to be quantized; expected float32")
    return x


def _check_range(low: int, high: int, dtype: torch.dtype) -> None:
    limits = torch.iinfo(dtype)
    if low < limits.min or high > limits.max:
        raise ValueError(f"quant_min {low} and quant_max {high} do not fit into {dtype}")


def _check_integers(x: Tensor, dtype: torch.dtype) -> None:
    if x.dtype != dtype:
        raise TypeError(f"a tensor of dtype {x.dtype} was given to be dequantized; expected {dtype}")


def _along(values: Tensor, x: Tensor, axis: int) -> Tensor:
    """One number a channel in a shape that broadcasts against `x`."""
    return values.view([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])


def _quantize_per_tensor(
    x: Tensor, scale: Any, zero_point: Any, low: int, high: int, dtype: torch.dtype
) -> Tensor:
    """``clip(round(x * (1 / scale)) + zero_point)``, halves to even; the reciprocal is taken in double precision."""
    x = _check_input(x)
    _check_range(low, high, dtype)
    integers: Tensor = torch.round(x * (1.0 / _number(scale))) + _number(zero_point)
    return integers.clamp(low, high).to(dtype)


def _dequantize_per_tensor(
    x: Tensor,
    scale: Any,
    zero_point: Any,
    low: int,
    high: int,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    _check_integers(x, dtype)
    shifted: Tensor = x.to(out_dtype or torch.float32) - _number(zero_point)
    return shifted.mul(_number(scale))


def _quantize_per_channel(
    x: Tensor, scales: Tensor, zero_points: Tensor, axis: int, low: int, high: int, dtype: torch.dtype
) -> Tensor:
    x = _check_input(x)
    _check_range(low, high, dtype)
    integers = torch.round(x * (1.0 / _along(scales, x, axis))) + _along(zero_points, x, axis)
    return integers.clamp(low, high).to(dtype)


def _dequantize_per_channel(
    x: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    axis: int,
    low: int,
    high: int,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    _check_integers(x, dtype)
    shifted = x if zero_points is None else x - _along(zero_points, x, axis)
    return (shifted * _along(scales, x, axis)).to(out_dtype or torch.float32)


def _dequantize_per_channel_group(
    x: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    low: int,
    high: int,
    dtype: torch.dtype,
    group: int,
    out_dtype: torch.dtype,
) -> Tensor:
    _check_integers(x, dtype)
    grouped = x.reshape(-1, group)
    shifted = grouped if zero_points is None else grouped - zero_points.reshape(-1, 1)
    return (shifted * scales.reshape(-1, 1)).reshape(x.shape).to(out_dtype)


def _quantize_per_token(
    x: Tensor, scales: Tensor, zero_points: Tensor, low: int, high: int, dtype: torch.dtype
) -> Tensor:
    """``clip(round(x * (1 / scale) + zero_point))``, halves to even; rounded once, behind the sum."""
    _check_range(low, high, dtype)
    return torch.round(x * (1.0 / scales) + zero_points).clamp(low, high).to(dtype)


def _dequantize_per_token(
    x: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    low: int,
    high: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    _check_integers(x, dtype)
    return ((x - zero_points) * scales).to(out_dtype)


def _fake_quantize(x: Tensor, *grid: Any) -> Tensor:
    return torch.empty_like(x, dtype=grid[-1])


def _fake_dequantize(x: Tensor, *_grid: Any, out_dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=out_dtype or torch.float32)


def _fake_widened(x: Tensor, *given: Any) -> Tensor:
    return torch.empty_like(x, dtype=given[-1])


_FAKE = {"dequantize_per_channel_group": _fake_widened, "dequantize_per_token": _fake_widened}
_COMPUTE = {
    "dequantize_per_channel_group": _dequantize_per_channel_group,
    "quantize_per_token": _quantize_per_token,
    "dequantize_per_token": _dequantize_per_token,
    "quantize_per_tensor": _quantize_per_tensor,
    "dequantize_per_tensor": _dequantize_per_tensor,
    "quantize_per_channel": _quantize_per_channel,
    "dequantize_per_channel": _dequantize_per_channel,
}
