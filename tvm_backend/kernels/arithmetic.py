"""The arithmetic that all references share, in numpy, exact to the bit.

The sums are exact in integers.  The epilogue is float32 with fused multiply-add, which numpy lacks; :func:`fma32`
emulates it through float64 with the sum rounded to odd, after which the rounding to float32 is correct
(S. Boldo and G. Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd",
IEEE Transactions on Computers 57(4), 2008, theorem 1: two more than twice the bits of the target suffice).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_backend.kernels.spec import Epilogue, QParams, TensorKind

__all__ = ["add_to", "apply_epilogue", "dequantize", "fma32", "quantize", "scaled_sum"]


def fma32(a: NDArray[Any], b: NDArray[Any] | np.float32, c: NDArray[Any]) -> NDArray[np.float32]:
    """``a * b + c`` of float32 arrays with a single rounding.

    Parameters
    ----------
    a, b, c : ndarray of float32
        Operands; they broadcast.

    Returns
    -------
    ndarray of float32
        The correctly rounded result.
    """
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    addend = np.asarray(c, np.float64)
    product, addend = np.broadcast_arrays(product, addend)
    total = product + addend
    # Knuth's two-sum: the exact error of the addition.
    part = total - product
    error = (product - (total - part)) + (addend - part)
    # Round to odd: an inexact sum whose last bit is even moves one step towards the exact value.
    bits = total.view(np.int64)
    even = (error != 0) & (bits & 1 == 0) & np.isfinite(total)
    towards = np.where(error > 0, np.inf, -np.inf)
    result: NDArray[np.float32] = np.where(even, np.nextafter(total, towards), total).astype(np.float32)
    return result


def quantize(value: NDArray[np.float32], qparams: QParams) -> NDArray[Any]:
    """``clamp(rint(value * float32(1 / scale)) + zero_point)``, ties to even, in the storage type; 0 for NaN."""
    value = np.where(np.isnan(value), np.float32(-qparams.zero_point * qparams.step), value)
    scaled = np.rint(value.astype(np.float32) * np.float32(qparams.inverse))
    low, high = qparams.qmin - qparams.zero_point, qparams.qmax - qparams.zero_point
    shifted: NDArray[Any] = np.clip(scaled, low, high).astype(np.int32) + qparams.zero_point
    return shifted.astype(qparams.dtype)


def dequantize(value: NDArray[Any], kind: TensorKind) -> NDArray[np.float32]:
    """``float32(value - zero_point) * float32(scale)``; a float32 tensor is returned as it is."""
    if not isinstance(kind, QParams):
        return value.astype(np.float32)
    return (value.astype(np.int32) - kind.zero_point).astype(np.float32) * np.float32(kind.step)


def add_to(total: NDArray[np.float32], value: NDArray[Any], kind: TensorKind) -> NDArray[np.float32]:
    """Add a tensor to a float32 value, an integer one by fused multiply-add."""
    if not isinstance(kind, QParams):
        return (total + value.astype(np.float32)).astype(np.float32)
    shifted = (value.astype(np.int32) - kind.zero_point).astype(np.float32)
    return fma32(shifted, np.float32(kind.step), total)


def scaled_sum(acc: NDArray[np.int32], scale: NDArray[Any], bias: NDArray[Any]) -> NDArray[np.float32]:
    """``fma(float32(acc), scale, bias)`` along the last axis."""
    return fma32(acc.astype(np.float32), scale.astype(np.float32), bias.astype(np.float32))


def apply_epilogue(
    value: NDArray[np.float32], epilogue: Epilogue, residual: NDArray[Any] | None = None
) -> tuple[NDArray[Any], ...]:
    """Branch, residual, clip and outputs of a float32 value.

    Parameters
    ----------
    value : ndarray of float32
        What the kernel computed.
    epilogue : Epilogue
        What is made of it.
    residual : ndarray, optional
        The residual, where the epilogue has one.

    Returns
    -------
    tuple of ndarray
        One array an output.
    """
    if epilogue.branch is not None:
        value = dequantize(quantize(value, epilogue.branch), epilogue.branch)
    if epilogue.residual is not None:
        assert residual is not None
        value = add_to(value, residual, epilogue.residual)
    low, high = epilogue.clip
    if low is not None:
        value = np.maximum(value, np.float32(low))
    if high is not None:
        value = np.minimum(value, np.float32(high))
    return tuple(
        quantize(value, kind) if isinstance(kind, QParams) else value.astype(np.float32)
        for kind in epilogue.outputs
    )
