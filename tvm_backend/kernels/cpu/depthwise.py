"""Depthwise convolution: every channel has a filter of its own, vectors run over channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_backend.kernels import tir
from tvm_backend.kernels.cpu import ir
from tvm_backend.kernels.cpu.conv2d import reference
from tvm_backend.kernels.cpu.epilogue import pieces
from tvm_backend.kernels.cpu.tasks import Tasks
from tvm_backend.kernels.cpu.weighted import Operands, Weighted
from tvm_backend.kernels.cpu.window import Window
from tvm_backend.kernels.kernel import Machine
from tvm_backend.kernels.spec import ConvSpec
from tvm_backend.kernels.tir import Expr
from tvm_backend.kernels.weights import as_int8

__all__ = ["Depthwise", "reference"]

_WINDOW_BYTES = 48 * 1024
"""Input rows that a task copies at once, so that they stay in the cache nearest to the core."""

_TASK_MACS = 400_000
"""Work that is worth handing to a thread."""


@dataclass(frozen=True)
class Depthwise(Weighted[ConvSpec]):
    """Generator of the kernel for one :class:`ConvSpec`; the instruction set gives the width of a vector only.

    The weights are so few that they are kept in 8 bits, ``[tap][channel]``, at any bit-width.
    """

    @classmethod
    def takes(cls, spec: ConvSpec, isa: Machine) -> bool:
        """Whether channels are convolved on their own."""
        return spec.depthwise

    @property
    def flip(self) -> bool:
        """Never: products are those of plain arithmetic."""
        return False

    @property
    def pixels(self) -> int:
        """Pixels in a register tile."""
        width = self.spec.out_width
        return -(-width // -(-width // 8))

    def tasks(self, batch: Expr) -> Tasks:
        """Output rows put together to tasks."""
        spec = self.spec
        fitting = (_WINDOW_BYTES // Window(spec, 1, False).pitch - spec.kernel[0]) // spec.stride[0]
        cost = max(1, spec.macs // spec.out_height)
        return Tasks(batch, spec.out_height, cost, _TASK_MACS, fitting)

    @property
    def weight_length(self) -> int:
        """Bytes of the packed weight."""
        return self.spec.kernel[0] * self.spec.kernel[1] * self.spec.out_channels

    def pack_weight(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Lay weights of shape (C, 1, kernel height, kernel width) out as [tap][channel]."""
        flat = as_int8(weight).reshape(weight.shape[0], -1)
        return np.ascontiguousarray(flat.T.reshape(-1))

    def emit(self, batch: Expr, operands: Operands) -> None:
        """Write the body."""
        spec, tasks = self.spec, self.tasks(batch)
        window = Window(spec, tasks.chunk, flip=False)

        def task(image: Expr, first: Expr, count: Expr) -> None:
            rows = window.allocate()
            in_rows = (count - 1) * spec.stride[0] + spec.dilation[0] * (spec.kernel[0] - 1) + 1
            window.fill(
                rows, operands.data, operands.zero, image, first * spec.stride[0] - spec.padding[0], in_rows
            )
            with tir.loop(count) as row:
                for begin, repeat, lanes in pieces(spec.out_channels, self.isa.lanes):
                    with tir.loop(repeat) as piece:
                        self._row(operands, window, rows, image, row, first, begin + piece * lanes, lanes)

        tasks.run(task)

    def _row(
        self,
        operands: Operands,
        window: Window,
        rows: Any,
        image: Expr,
        row: Expr,
        first: Expr,
        channel: Expr,
        lanes: int,
    ) -> None:
        """One output row of one vector of channels."""
        full, rest = divmod(self.spec.out_width, self.pixels)
        with tir.loop(full) as tile:
            self._tile(
                operands, window, rows, image, row, first, channel, lanes, tile * self.pixels, self.pixels
            )
        if rest:
            self._tile(operands, window, rows, image, row, first, channel, lanes, full * self.pixels, rest)

    def _tile(
        self,
        operands: Operands,
        window: Window,
        rows: Any,
        image: Expr,
        row: Expr,
        first: Expr,
        channel: Expr,
        lanes: int,
        x: Expr,
        pixels: int,
    ) -> None:
        spec = self.spec
        held = ir.Registers(pixels, "int32", lanes)
        for p in range(pixels):
            held[p] = tir.load(operands.compensation, [channel], lanes)
        for ky in range(spec.kernel[0]):
            for kx in range(spec.kernel[1]):
                tap = (ky * spec.kernel[1] + kx) * spec.out_channels
                weights = ir.hold(
                    tir.cast(tir.load(operands.weight, [tap + channel], lanes), "int16", lanes),
                    "int16",
                    lanes,
                )
                y = row * spec.stride[0] + ky * spec.dilation[0]
                for p in range(pixels):
                    column = (x + p) * spec.stride[1] + kx * spec.dilation[1]
                    place = y * window.pitch + column * spec.in_channels + channel
                    # A product of 8-bit values fits in 16 bits.
                    product = tir.cast(tir.load(rows, [place], lanes), "int16", lanes) * weights
                    held[p] = held[p] + tir.cast(product, "int32", lanes)
        for p in range(pixels):
            operands.finish(held[p], [image, first + row, x + p], channel, lanes)
