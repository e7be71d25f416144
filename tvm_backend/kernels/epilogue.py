"""The epilogue in registers: scale, bias, residual, activation and quantization of one vector of channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tvm_backend.kernels import ir
from tvm_backend.kernels.arithmetic import storage_dtype
from tvm_backend.kernels.ir import Expr
from tvm_backend.kernels.spec import Epilogue, QParams, TensorKind

__all__ = ["chunks", "dequantized", "finish", "output_arguments", "pieces", "quantized", "residual_argument"]


def chunks(count: int, lanes: int) -> list[tuple[int, int]]:
    """Split `count` channels into vectors: full ones, then halves, quarters and so on, as (start, lanes)."""
    pieces, start, width = [], 0, lanes
    while start < count:
        while width > count - start:
            width //= 2
        pieces.append((start, width))
        start += width
    return pieces


def pieces(count: int, lanes: int) -> list[tuple[int, int, int]]:
    """`count` channels as runs of equally wide vectors: (start, number of vectors, lanes)."""
    runs: list[tuple[int, int, int]] = []
    for begin, width in chunks(count, lanes):
        if runs and runs[-1][2] == width:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, width)
        else:
            runs.append((begin, 1, width))
    return runs


def dequantized(raw: Expr, kind: TensorKind, lanes: int, onto: Expr | None = None) -> Expr:
    """The real value of a loaded vector, added to `onto` by fused multiply-add if that is given."""
    if not isinstance(kind, QParams):
        # Without the fence LLVM might fuse a product with this addition, on some targets only.
        return raw if onto is None else ir.fence(onto, lanes) + raw
    shifted = ir.cast(raw, "int32", lanes)
    if kind.zero_point:
        shifted = shifted - ir.constant(kind.zero_point, "int32", lanes)
    value, step = ir.cast(shifted, "float32", lanes), ir.constant(kind.step, "float32", lanes)
    return value * step if onto is None else ir.fma(value, step, onto, lanes)


def quantized(
    value: Expr, kind: TensorKind, lanes: int, clip: tuple[float | None, float | None] = (None, None)
) -> Expr:
    """Clip a float32 vector and quantize it, or leave it float32.

    Multiplication by a positive constant is monotone even after rounding, so clipping to ``[a, b]`` first equals
    clipping to ``[fl(a * inverse), fl(b * inverse)]`` afterwards; activation and saturation become one pair of bounds.
    """
    low, high = clip
    if not isinstance(kind, QParams):
        bounds = [(low, ir.larger), (high, ir.smaller)]
        for bound, function in bounds:
            if bound is not None:
                value = function(value, ir.constant(float(np.float32(bound)), "float32", lanes))
        return value
    inverse = np.float32(kind.inverse)
    least, most = np.float32(kind.qmin - kind.zero_point), np.float32(kind.qmax - kind.zero_point)
    if low is not None:
        least = np.clip(np.float32(low) * inverse, least, most)
    if high is not None:
        most = np.clip(np.float32(high) * inverse, least, most)
    scaled = value * ir.constant(float(inverse), "float32", lanes)
    scaled = ir.larger(scaled, ir.constant(float(least), "float32", lanes))
    scaled = ir.smaller(scaled, ir.constant(float(most), "float32", lanes))
    integer = ir.round_to_int(scaled, lanes)
    if kind.zero_point:
        integer = integer + ir.constant(kind.zero_point, "int32", lanes)
    return ir.cast(integer, kind.dtype, lanes)


def residual_argument(epilogue: Epilogue, shape: Sequence[Expr]) -> list[ir.Argument]:
    """The residual as a kernel argument; none if the epilogue has none."""
    if epilogue.residual is None:
        return []
    return [("residual", shape, storage_dtype(epilogue.residual))]


def output_arguments(epilogue: Epilogue, shape: Sequence[Expr]) -> list[ir.Argument]:
    """The outputs as kernel arguments."""
    return [(f"output{i}", shape, storage_dtype(kind)) for i, kind in enumerate(epilogue.outputs)]


def finish(
    value: Expr,
    epilogue: Epilogue,
    residual: Any,
    outputs: Sequence[Any],
    indices: Sequence[Expr],
    lanes: int,
) -> None:
    """Add the residual to a float32 vector, clip it and store it to every output at `indices`."""
    if epilogue.residual is not None:
        value = dequantized(ir.load(residual, indices, lanes), epilogue.residual, lanes, onto=value)
    if len(outputs) > 1:
        value = ir.hold(value, "float32", lanes)
    for output, kind in zip(outputs, epilogue.outputs, strict=True):
        ir.store(output, quantized(value, kind, lanes, epilogue.clip), indices, lanes)
