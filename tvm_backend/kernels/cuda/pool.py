"""Max and average pooling on CUDA: a thread for each output value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tvm_backend.kernels import tir
from tvm_backend.kernels.cuda import device
from tvm_backend.kernels.cuda.epilogue import dequantized, finish
from tvm_backend.kernels.cuda.pointwise import Pointwise
from tvm_backend.kernels.spec import PoolSpec
from tvm_backend.kernels.tir import Expr

__all__ = ["CudaPool"]


@dataclass(frozen=True)
class CudaPool(Pointwise[PoolSpec]):
    """Generator of the kernel for one :class:`PoolSpec`."""

    def emit(self, buffers: list[Any], image: Expr, indices: list[Expr]) -> None:
        """Compute and store one place."""
        spec = self.spec
        data, *rest = buffers
        residual = rest.pop(0) if spec.epilogue.residual is not None else None
        y, x, channel = indices
        top, left = y * spec.stride[0] - spec.padding[0], x * spec.stride[1] - spec.padding[1]
        held = device.local(1, "int32")
        lowest = 0 if spec.kind == "avg" else -128 if spec.input.signed else 0
        tir.store(held, tir.constant(lowest, "int32"), [0])
        with tir.loop(spec.kernel[0]) as i, tir.loop(spec.kernel[1]) as j:
            row, column = top + i, left + j
            with tir.when(tir.all_of(row >= 0, row < spec.height, column >= 0, column < spec.width)):
                raw = tir.cast(tir.load(data, [image, row, column, channel]), "int32")
                centred = raw - tir.constant(spec.input.zero_point, "int32")
                found = tir.larger(held[0], raw) if spec.kind == "max" else held[0] + centred
                tir.store(held, found, [0])
        where = [image, *indices]
        if spec.kind == "max":
            value = dequantized(held[0], spec.input)
        else:
            value = device.times(tir.cast(held[0], "float32"), _factor(spec, y, x))
        finish(value, spec.epilogue, residual, rest, where)


def _factor(spec: PoolSpec, y: Expr, x: Expr) -> Expr:
    """``float32(scale / divisor)`` of a window: one constant, or a choice among the places that differ."""
    divisors = spec.divisors()
    values, counts = np.unique(divisors, return_counts=True)
    usual = int(values[counts.argmax()])

    def constant(divisor: int) -> Expr:
        return tir.constant(float(np.float32(spec.input.scale / divisor)), "float32")

    if len(values) == 1:
        return constant(usual)
    # The number of places inside the input (or its padding) is a product of two extents.
    top, left, bottom, right = spec.padding if spec.count_include_pad else (0, 0, 0, 0)
    before = spec.padding[:2]
    rows = _extent(y, spec.stride[0], before[0], spec.kernel[0], -top, spec.height + bottom)
    columns = _extent(x, spec.stride[1], before[1], spec.kernel[1], -left, spec.width + right)
    result = constant(usual)
    for value in values:
        if int(value) != usual:
            result = tir.if_else(rows * columns == int(value), constant(int(value)), result)
    return result


def _extent(index: Expr, stride: int, before: int, kernel: int, low: int, high: int) -> Expr:
    """Places of a window along one axis between two limits."""
    start = index * stride - before
    return tir.smaller(start + kernel, high) - tir.larger(start, low)
