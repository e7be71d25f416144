"""Where float32 becomes integers and back, changing between channels first and channels last on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from tvm.tirx import PrimFunc

from tvm_backend.kernels import arithmetic, tir
from tvm_backend.kernels.cpu import ir
from tvm_backend.kernels.cpu.epilogue import defined, dequantized, pieces, quantized
from tvm_backend.kernels.cpu.generator import CpuGenerator
from tvm_backend.kernels.cpu.quantity import Quantity
from tvm_backend.kernels.cpu.tasks import TASK_ELEMENTS, Tasks, flat
from tvm_backend.kernels.spec import DequantizeSpec, QParams, QuantizeSpec
from tvm_backend.kernels.tir import Expr

__all__ = ["Dequantize", "Quantize", "dequantize_reference", "quantize_reference"]

_FEW = 4
"""Channels of an image, whose pixels are put together in registers."""

_AHEAD = 3
"""Rows that are asked for before they are read: a row of each channel is too short a stretch for the processor's guesses."""


def quantize_reference(spec: QuantizeSpec, data: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """What :class:`Quantize` computes, in numpy."""
    if spec.to_channels_last:
        data = data.transpose(0, 2, 3, 1)
    return tuple(arithmetic.quantize(data, qparams) for qparams in spec.outputs)


def dequantize_reference(spec: DequantizeSpec, data: NDArray[Any]) -> tuple[NDArray[Any]]:
    """What :class:`Dequantize` computes, in numpy."""
    value = arithmetic.dequantize(data, spec.input)
    return (value.transpose(0, 3, 1, 2) if spec.to_channels_first else value,)


@dataclass(frozen=True)
class Quantize(CpuGenerator[QuantizeSpec]):
    """Generator of the kernel for one :class:`QuantizeSpec`."""

    def build(self, name: str) -> PrimFunc:
        """The PrimFunc."""
        spec = self.spec
        batch = tir.batch_extent(spec.batch)
        with tir.Function(name) as function:
            data, *outputs = function.buffers(self.arguments(batch))
            if spec.to_channels_last:
                self._transpose(batch, data, outputs)
            else:
                lead = [0] * (len(spec.shape) - 1)

                def vectors(image: Expr, start: Expr, lanes: int) -> None:
                    where = [image, *lead, start]
                    value = tir.load(data, where, lanes)
                    for output, qparams in zip(outputs, spec.outputs, strict=True):
                        known = defined(value, qparams, lanes)
                        integers = quantized(known, Quantity.of(qparams), lanes)
                        tir.store(output, integers, where, lanes)

                flat(batch, math.prod(spec.shape), self.isa.lanes, vectors)
        return function.result

    def _transpose(self, batch: Expr, data: Any, outputs: list[Any]) -> None:
        channels, height, width = self.spec.shape
        rows = self._mixed if channels <= _FEW else self._gathered

        def task(image: Expr, first: Expr, count: Expr) -> None:
            for output, qparams in zip(outputs, self.spec.outputs, strict=True):
                rows(data, output, qparams, image, first, count)

        Tasks(batch, height, channels * width, TASK_ELEMENTS).run(task)

    def _vector(
        self, data: Any, qparams: QParams, image: Expr, c: Expr, y: Expr, x: Expr, lanes: int
    ) -> Expr:
        """Some quantized pixels of one channel."""
        ir.prefetch(data, [image, c, tir.least(y + _AHEAD, self.spec.shape[1] - 1), x])
        known = defined(tir.load(data, [image, c, y, x], lanes), qparams, lanes)
        return quantized(known, Quantity.of(qparams), lanes)

    def _mixed(self, data: Any, output: Any, qparams: QParams, image: Expr, first: Expr, count: Expr) -> None:
        """Rows of few channels: one vector of each, whose pixels are put together in registers."""
        channels, _, width = self.spec.shape
        for begin, repeat, lanes in pieces(width, self.isa.lanes):
            order = [c * lanes + p for p in range(lanes) for c in range(channels)]
            with tir.loop(count) as row, tir.loop(repeat) as piece:
                y, x = first + row, begin + piece * lanes
                vectors = [self._vector(data, qparams, image, c, y, x, lanes) for c in range(channels)]
                if lanes > 1 and channels > 1:
                    vectors = [tir.shuffle(vectors, order)]
                for c, vector in enumerate(vectors):
                    tir.store(output, vector, [image, y, x, c], lanes * channels // len(vectors))

    def _gathered(
        self, data: Any, output: Any, qparams: QParams, image: Expr, first: Expr, count: Expr
    ) -> None:
        """Rows of many: each channel is quantized as vectors and kept; then pixels are put together."""
        channels, _, width = self.spec.shape
        kept = tir.allocate((channels, width), qparams.dtype)
        with tir.loop(count) as row:
            y = first + row
            with tir.loop(channels) as c:
                for begin, repeat, lanes in pieces(width, self.isa.lanes):
                    with tir.loop(repeat) as piece:
                        x = begin + piece * lanes
                        tir.store(kept, self._vector(data, qparams, image, c, y, x, lanes), [c, x], lanes)
            with tir.loop(width) as x, tir.loop(channels) as c:
                tir.store(output, tir.load(kept, [c, x]), [image, y, x, c])


@dataclass(frozen=True)
class Dequantize(CpuGenerator[DequantizeSpec]):
    """Generator of the kernel for one :class:`DequantizeSpec`."""

    def build(self, name: str) -> PrimFunc:
        """The PrimFunc."""
        spec = self.spec
        batch = tir.batch_extent(spec.batch)
        with tir.Function(name) as function:
            data, output = function.buffers(self.arguments(batch))
            if spec.to_channels_first:
                height, width, channels = spec.shape

                def task(image: Expr, first: Expr, count: Expr) -> None:
                    with tir.loop(count) as row, tir.loop(channels) as c, tir.loop(width) as x:
                        raw = tir.load(data, [image, first + row, x, c])
                        tir.store(
                            output, dequantized(raw, Quantity.of(spec.input), 1), [image, c, first + row, x]
                        )

                Tasks(batch, height, channels * width, TASK_ELEMENTS).run(task)
            else:
                lead = [0] * (len(spec.shape) - 1)

                def vectors(image: Expr, start: Expr, lanes: int) -> None:
                    where = [image, *lead, start]
                    value = dequantized(tir.load(data, where, lanes), Quantity.of(spec.input), lanes)
                    tir.store(output, value, where, lanes)

                flat(batch, math.prod(spec.shape), self.isa.lanes, vectors)
        return function.result
