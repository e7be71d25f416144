"""The epilogue of one value on a CUDA device: the same arithmetic as on a CPU, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tvm_backend.kernels import tir
from tvm_backend.kernels.cuda import device
from tvm_backend.kernels.spec import Epilogue, QParams, TensorKind
from tvm_backend.kernels.tir import Expr

__all__ = [
    "CHANNELWISE",
    "defined",
    "dequantized",
    "finish",
    "finish_pair",
    "finish_sum",
    "quantized",
    "scaled_sum",
]

CHANNELWISE = ("compensation", "scale", "bias")
"""Arguments that hold a number for each output channel."""


def dequantized(raw: Expr, kind: TensorKind, onto: Expr | None = None) -> Expr:
    """The real value of a stored one, added to `onto` by fused multiply-add if that is given."""
    if not isinstance(kind, QParams):
        return raw if onto is None else device.plus(onto, raw)
    shifted = tir.cast(tir.cast(raw, "int32") - tir.constant(kind.zero_point, "int32"), "float32")
    step = tir.constant(kind.step, "float32")
    return device.times(shifted, step) if onto is None else device.fma(shifted, step, onto)


def defined(value: Expr, kind: QParams) -> Expr:
    """A float32 value, or what integer 0 stands for where it is NaN: PyTorch's conversion makes 0 of it."""
    zero = np.float32(-kind.zero_point * kind.step)
    return tir.select(tir.is_nan(value), tir.constant(float(zero), "float32"), value)


def quantized(value: Expr, kind: TensorKind, clip: tuple[float | None, float | None] = (None, None)) -> Expr:
    """Clip a float32 value and quantize it, or leave it float32; see the CPU's epilogue for why clips commute."""
    low, high = clip
    if not isinstance(kind, QParams):
        if low is not None:
            value = tir.larger(value, tir.constant(float(np.float32(low)), "float32"))
        if high is not None:
            value = tir.smaller(value, tir.constant(float(np.float32(high)), "float32"))
        return value
    inverse = np.float32(kind.inverse)
    least, most = np.float32(kind.qmin - kind.zero_point), np.float32(kind.qmax - kind.zero_point)
    if low is not None:
        least = np.clip(np.float32(low) * inverse, least, most)
    if high is not None:
        most = np.clip(np.float32(high) * inverse, least, most)
    scaled = device.times(value, tir.constant(float(inverse), "float32"))
    scaled = tir.larger(scaled, tir.constant(float(least), "float32"))
    scaled = tir.smaller(scaled, tir.constant(float(most), "float32"))
    integer = device.rounded(scaled) + tir.constant(kind.zero_point, "int32")
    return tir.cast(integer, kind.dtype)


def _passed(value: Expr, epilogue: Epilogue, residual: Any, indices: Sequence[Expr]) -> Expr:
    """A value with its branch and residual."""
    if epilogue.branch is not None:
        value = dequantized(quantized(value, epilogue.branch), epilogue.branch)
    if epilogue.residual is not None:
        value = dequantized(tir.load(residual, indices), epilogue.residual, onto=value)
    return value


def finish(
    value: Expr, epilogue: Epilogue, residual: Any, outputs: Sequence[Any], indices: Sequence[Expr]
) -> None:
    """Add the residual to a float32 value, clip it and store it to every output at `indices`."""
    held = device.local(1, "float32")
    tir.store(held, _passed(value, epilogue, residual, indices), [0])
    for output, kind in zip(outputs, epilogue.outputs, strict=True):
        tir.store(output, quantized(held[0], kind, epilogue.clip), indices)


def finish_pair(
    values: Sequence[Expr], epilogue: Epilogue, residual: Any, outputs: Sequence[Any], indices: Sequence[Expr]
) -> None:
    """The same for two values that are neighbours along the last axis, the first at `indices`, an even place."""
    held = device.local(2, "float32")
    for i, value in enumerate(values):
        where = [*indices[:-1], indices[-1] + i]
        tir.store(held, _passed(value, epilogue, residual, where), [i])
    for output, kind in zip(outputs, epilogue.outputs, strict=True):
        device.store_pair(output, indices, *(quantized(held[i], kind, epilogue.clip) for i in range(2)))


def scaled_sum(total: Expr, compensation: Expr, scale: Expr, bias: Expr) -> Expr:
    """Compensation, scale and bias of an int32 sum of products."""
    return device.fma(tir.cast(total + compensation, "float32"), scale, bias)


def finish_sum(
    total: Expr,
    channel: Expr,
    buffers: dict[str, Any],
    epilogue: Epilogue,
    outputs: Sequence[Any],
    indices: Sequence[Expr],
) -> None:
    """Compensation, scale and bias of an int32 sum of products, then the rest."""
    value = scaled_sum(total, *(tir.load(buffers[name], [channel]) for name in CHANNELWISE))
    finish(value, epilogue, buffers.get("residual"), outputs, indices)
