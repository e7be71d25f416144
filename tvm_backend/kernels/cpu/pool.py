"""Max and average pooling on integers, channels last."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.tirx import PrimFunc

from tvm_backend.kernels import tir
from tvm_backend.kernels.arithmetic import apply_epilogue, dequantize
from tvm_backend.kernels.cpu import ir
from tvm_backend.kernels.cpu.epilogue import (
    chunks,
    dequantized,
    finish,
    finish_row,
    pieces,
)
from tvm_backend.kernels.cpu.generator import CpuGenerator
from tvm_backend.kernels.cpu.quantity import Finish, Quantity
from tvm_backend.kernels.cpu.tasks import Tasks
from tvm_backend.kernels.spec import Epilogue, PoolSpec
from tvm_backend.kernels.tir import Expr

__all__ = ["Pool", "reference"]

_TASK = 100_000
"""Elements read that are worth handing to a thread."""


def reference(
    spec: PoolSpec, data: NDArray[Any], residual: NDArray[Any] | None = None
) -> tuple[NDArray[Any], ...]:
    """What the pooling kernel computes, in numpy; `data` has shape (N, H, W, C)."""
    rows, columns = spec.spans()
    result = np.zeros((data.shape[0], spec.out_height, spec.out_width, spec.channels), np.float32)
    divisors = spec.divisors()
    for i, (y0, y1) in enumerate(rows):
        for j, (x0, x1) in enumerate(columns):
            places = data[:, y0:y1, x0:x1].astype(np.int32)
            if spec.kind == "max":
                result[:, i, j] = dequantize(places.max(axis=(1, 2)), spec.input)
            else:
                total = (places - spec.input.zero_point).sum(axis=(1, 2), dtype=np.int32)
                factor = np.float32(spec.input.scale / int(divisors[i, j]))
                result[:, i, j] = total.astype(np.float32) * factor
    return apply_epilogue(result, spec.epilogue, residual)


@dataclass(frozen=True)
class Pool(CpuGenerator[PoolSpec]):
    """Generator of the kernel for one :class:`PoolSpec`."""

    @property
    def integers_only(self) -> bool:
        """Whether the largest integer is the output as it is."""
        spec = self.spec
        plain = Epilogue(outputs=(spec.input,))
        return spec.kind == "max" and spec.epilogue == plain

    @property
    def form(self) -> Hashable:
        """What the function depends on: the largest integer is the same on every grid."""
        if not self.integers_only:
            return super().form
        grid = replace(self.spec.input, scale=1.0, zero_point=0)
        return (
            type(self).__name__,
            self.isa,
            replace(self.spec, input=grid, epilogue=Epilogue(outputs=(grid,))),
        )

    def build(self, name: str) -> PrimFunc:
        """The PrimFunc."""
        spec = self.spec
        batch = tir.batch_extent(spec.batch)
        # Bytes are compared as they are; sums need 32 bits.
        lanes = self.isa.lanes * (4 if spec.kind == "max" else 1)
        with tir.Function(name) as function:
            data, *rest = function.buffers(self.arguments(batch))
            residual = rest.pop(0) if spec.epilogue.residual is not None else None

            def task(image: Expr, first: Expr, count: Expr) -> None:
                for begin, repeat, width in pieces(spec.channels, lanes):
                    with tir.loop(count) as y, tir.loop(spec.out_width) as x, tir.loop(repeat) as piece:
                        where = [image, first + y, x, begin + piece * width]
                        self._window(data, residual, rest, where, width)

            cost = spec.out_width * spec.channels * spec.kernel[0] * spec.kernel[1]
            Tasks(batch, spec.out_height, cost, _TASK).run(task)
        return function.result

    def _window(self, data: Any, residual: Any, outputs: list[Any], where: list[Expr], lanes: int) -> None:
        """One vector of channels at one output place."""
        spec = self.spec
        image, y, x, channel = where
        row, first, last = _bounds(y, spec.height, spec.kernel[0], spec.stride[0], spec.padding[0])
        column, left, right = _bounds(x, spec.width, spec.kernel[1], spec.stride[1], spec.padding[1])
        dtype = spec.input.dtype if spec.kind == "max" else "int32"
        lowest = 0 if spec.kind == "avg" else -128 if spec.input.signed else 0
        held = ir.Registers(1, dtype, lanes)
        held[0] = tir.constant(lowest, dtype, lanes)
        with tir.loop(last - first) as i, tir.loop(right - left) as j:
            value = tir.load(data, [image, row + first + i, column + left + j, channel], lanes)
            total = held[0]
            held[0] = (
                tir.larger(total, value) if spec.kind == "max" else total + tir.cast(value, dtype, lanes)
            )
        result = held[0]
        epilogue = Finish.of(spec.epilogue)
        if self.integers_only:
            tir.store(outputs[0], result, where, lanes)
        elif spec.kind == "max":
            parts = [ir.part(result, begin, width) for begin, width in chunks(lanes, self.isa.lanes)]
            reals = [dequantized(part, Quantity.of(spec.input), min(lanes, self.isa.lanes)) for part in parts]
            if len(reals) > 1:
                finish_row(reals, epilogue, residual, outputs, where, self.isa)
            else:
                finish(reals[0], epilogue, residual, outputs, where, lanes)
        else:
            places = tir.cast((last - first) * (right - left), "int32")
            centred = result - tir.broadcast(places * tir.constant(spec.input.zero_point, "int32"), lanes)
            real = tir.cast(centred, "float32", lanes) * tir.broadcast(
                self._factor(row, column, places), lanes
            )
            finish(real, epilogue, residual, outputs, where, lanes)

    def _factor(self, row: Expr, column: Expr, places: Expr) -> Expr:
        """``float32(scale / divisor)`` of a window: one constant, or a choice among the borders' few."""
        spec = self.spec
        values, counts = np.unique(spec.divisors(), return_counts=True)
        factors = {
            int(value): tir.constant(float(np.float32(spec.input.scale / int(value))), "float32")
            for value in values
        }
        usual = int(values[counts.argmax()])
        if spec.count_include_pad:
            rows = tir.least(spec.kernel[0], spec.height + spec.padding[2] - row)
            columns = tir.least(spec.kernel[1], spec.width + spec.padding[3] - column)
            places = rows * columns
        result = factors.pop(usual)
        for value, factor in factors.items():
            result = tir.select(places == value, factor, result)
        return result


def _bounds(index: Expr, size: int, kernel: int, stride: int, before: int) -> tuple[Expr, Expr, Expr]:
    """Start of a window and the first and past-last of its places that lie inside the input."""
    start = index * stride - before
    first = tir.larger(0, 0 - start) if before else 0
    return start, first, tir.least(kernel, size - start)
