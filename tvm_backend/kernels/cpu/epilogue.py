"""The epilogue in registers: scale, bias, residual, activation and quantization of one vector of channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tvm_backend.kernels import tir
from tvm_backend.kernels.cpu import ir
from tvm_backend.kernels.cpu.isa import InstructionSet
from tvm_backend.kernels.cpu.quantity import Finish, Kind, Quantity
from tvm_backend.kernels.spec import Epilogue, QParams
from tvm_backend.kernels.tir import Expr

__all__ = [
    "branched",
    "chunks",
    "defined",
    "dequantized",
    "finish",
    "finish_defined",
    "finish_row",
    "integers",
    "pieces",
    "quantized",
]


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


def dequantized(raw: Expr, kind: Kind, lanes: int, onto: Expr | None = None) -> Expr:
    """The real value of a loaded vector, added to `onto` by fused multiply-add if that is given."""
    if not isinstance(kind, Quantity):
        # Without the fence LLVM might fuse a product with this addition, on some targets only.
        return raw if onto is None else ir.fence(onto, lanes) + raw
    shifted = tir.cast(raw, "int32", lanes)
    if kind.zero is not None:
        shifted = shifted - tir.broadcast(kind.zero, lanes)
    value = tir.cast(shifted, "float32", lanes)
    if kind.step is None:
        return value if onto is None else ir.fence(onto, lanes) + value
    step = tir.broadcast(kind.step, lanes)
    return value * step if onto is None else ir.fma(value, step, onto, lanes)


def integers(value: Expr, kind: Quantity, lanes: int, isa: InstructionSet | None = None) -> Expr:
    """Clip a float32 vector and quantize it to int32; with `isa`, whose narrowing saturates, only where that is not enough."""
    scaled = value if kind.inverse is None else value * tir.broadcast(kind.inverse, lanes)
    if isa is None or kind.above:
        scaled = tir.larger(scaled, tir.broadcast(kind.least, lanes))
    if isa is None or kind.below:
        scaled = tir.smaller(scaled, tir.broadcast(kind.most, lanes))
    integer = isa.round_to_int(scaled) if isa is not None else ir.round_to_int(scaled, lanes)
    return integer if kind.zero is None else integer + tir.broadcast(kind.zero, lanes)


def defined(value: Expr, kind: QParams, lanes: int) -> Expr:
    """A float32 vector with what integer 0 stands for in place of NaN: PyTorch's conversion makes 0 of it."""
    zero = np.float32(-kind.zero_point * kind.step)
    return tir.select(tir.is_nan(value), tir.constant(float(zero), "float32", lanes), value)


def quantized(
    value: Expr, kind: Kind, lanes: int, clip: tuple[float | None, float | None] = (None, None)
) -> Expr:
    """Quantize a float32 vector to its storage type, or clip it and leave it float32."""
    if isinstance(kind, Quantity):
        return tir.cast(integers(value, kind, lanes), kind.dtype, lanes)
    for bound, function in zip(clip, (tir.larger, tir.smaller), strict=True):
        if bound is not None:
            value = function(value, tir.constant(float(np.float32(bound)), "float32", lanes))
    return value


def branched(value: Expr, epilogue: Finish, lanes: int) -> Expr:
    """A float32 vector quantized and dequantized, where the epilogue asks for it."""
    if epilogue.branch is None:
        return value
    return dequantized(integers(value, epilogue.branch, lanes), epilogue.branch, lanes)


def finish(
    value: Expr,
    epilogue: Finish,
    residual: Any,
    outputs: Sequence[Any],
    indices: Sequence[Expr],
    lanes: int,
) -> None:
    """Add the residual to a float32 vector, clip it and store it to every output at `indices`."""
    value = branched(value, epilogue, lanes)
    if epilogue.residual is not None:
        value = dequantized(tir.load(residual, indices, lanes), epilogue.residual, lanes, onto=value)
    if len(outputs) > 1:
        value = ir.hold(value, "float32", lanes)
    for output, kind in zip(outputs, epilogue.outputs, strict=True):
        tir.store(output, quantized(value, kind, lanes, epilogue.clip), indices, lanes)


def finish_defined(
    value: Expr, epilogue: Epilogue, outputs: Sequence[Any], indices: Sequence[Expr], lanes: int
) -> None:
    """:func:`finish` for a float32 vector that may hold NaN, of which a single integer output makes 0."""
    kind = epilogue.outputs[0]
    if isinstance(kind, QParams) and len(outputs) == 1:
        value = defined(ir.hold(value, "float32", lanes), kind, lanes)
    finish(value, Finish.of(epilogue), None, outputs, indices, lanes)


def finish_row(
    values: Sequence[Expr],
    epilogue: Finish,
    residual: Any,
    outputs: Sequence[Any],
    indices: Sequence[Expr],
    isa: InstructionSet,
) -> None:
    """:func:`finish` for several vectors of consecutive channels, stored together where that is faster."""
    lanes = isa.lanes
    if len(values) > 4:  # as many as are narrowed at once
        finish_row(values[:4], epilogue, residual, outputs, indices, isa)
        indices = [*indices[:-1], indices[-1] + 4 * lanes]
        finish_row(values[4:], epilogue, residual, outputs, indices, isa)
        return
    if not isa.narrows or len(values) == 1:
        for i, value in enumerate(values):
            finish(value, epilogue, residual, outputs, [*indices[:-1], indices[-1] + i * lanes], lanes)
        return
    places = [[*indices[:-1], indices[-1] + i * lanes] for i in range(len(values))]
    values = [branched(value, epilogue, lanes) for value in values]
    if epilogue.residual is not None:
        values = [
            dequantized(tir.load(residual, place, lanes), epilogue.residual, lanes, onto=value)
            for place, value in zip(places, values, strict=True)
        ]
    if len(outputs) > 1:
        values = [ir.hold(value, "float32", lanes) for value in values]
    for output, kind in zip(outputs, epilogue.outputs, strict=True):
        if not isinstance(kind, Quantity):
            for place, value in zip(places, values, strict=True):
                tir.store(output, quantized(value, kind, lanes, epilogue.clip), place, lanes)
            continue
        wide = [integers(value, kind, lanes, isa) for value in values]
        packed = ir.hold(isa.narrow(wide, kind.dtype), kind.dtype, 4 * lanes)
        for begin, width in chunks(len(values) * lanes, 4 * lanes):
            bytes_ = packed if width == 4 * lanes else ir.part(packed, begin, width)
            tir.store(output, bytes_, [*indices[:-1], indices[-1] + begin], width)
