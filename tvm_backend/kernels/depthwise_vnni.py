"""Depthwise convolution with dot-product instructions.

Such an instruction adds four products to each sum, so the four places of a kernel row have to lie side by side for
every channel.  Input rows are copied, padding included, sixteen channels at a time.  Each row of such a copy is brought
into that order once, in a ring that holds as many rows as the kernel is high; all kernel rows then read it.

A vector holds four output pixels, one in each 128-bit lane, and four channels of each.  Unpacking within lanes brings
bytes into this order and narrowing within lanes takes the results out of it, so neither has to cross lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_backend.kernels import ir
from tvm_backend.kernels.conv2d import reference
from tvm_backend.kernels.epilogue import finish, integers
from tvm_backend.kernels.ir import Expr
from tvm_backend.kernels.isa import InstructionSet
from tvm_backend.kernels.packing import as_int8
from tvm_backend.kernels.spec import ConvSpec, QParams
from tvm_backend.kernels.tasks import Tasks
from tvm_backend.kernels.weighted import Operands, Weighted

__all__ = ["DepthwiseDot", "reference"]

_WINDOW_BYTES = 256 * 1024
"""Input rows that a task copies at once, so that they stay in the core's own caches."""

_TASK_MACS = 300_000
"""Work that is worth handing to a thread."""

_PIXELS = 4
"""Pixels in a vector, one a lane."""

_VECTORS = 4
"""Vectors of pixels in a register tile, which share the loads of weights and constants."""

_CHANNELS = 16
"""Channels that are worked on together: four vectors of four."""


@dataclass(frozen=True)
class DepthwiseDot(Weighted):
    """Generator of the kernel for one :class:`ConvSpec`, see :meth:`takes`, with a set that multiplies groups of four."""

    spec: ConvSpec

    @staticmethod
    def takes(spec: ConvSpec, isa: InstructionSet) -> bool:
        """Whether this kernel can compute `spec`: whole blocks of channels and adjacent columns."""
        fits = spec.out_channels % _CHANNELS == 0 and spec.dilation[1] == 1
        return isa.narrows and isa.group == 4 and isa.lanes == 16 and fits

    @property
    def quads(self) -> int:
        """Instructions for one kernel row."""
        return -(-self.spec.kernel[1] // 4)

    @property
    def tiles(self) -> int:
        """Vectors of pixels in an output row, the last one possibly not full."""
        return -(-self.spec.out_width // _PIXELS)

    def tasks(self, batch: Expr) -> Tasks:
        """Output rows put together to tasks."""
        spec = self.spec
        row = (spec.padding[1] + spec.width + spec.padding[3]) * spec.in_channels
        fitting = (_WINDOW_BYTES // row - spec.kernel[0]) // spec.stride[0]
        return Tasks(batch, spec.out_height, spec.macs // spec.out_height, _TASK_MACS, fitting)

    @property
    def weight_length(self) -> int:
        """Bytes of the packed weight."""
        return self.spec.out_channels * self.spec.kernel[0] * self.quads * 4

    def pack_weight(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Lay weights of shape (C, 1, kernel height, kernel width) out as [block][row][quad][channel][4]."""
        rows, columns = self.spec.kernel
        padded = np.zeros((weight.shape[0], rows, self.quads * 4), np.int8)
        padded[:, :, :columns] = as_int8(weight)[:, 0]
        blocked = padded.reshape(-1, _CHANNELS, rows, self.quads, 4).transpose(0, 2, 3, 1, 4)
        return np.ascontiguousarray(blocked.reshape(-1))

    def emit(self, batch: Expr, operands: Operands) -> None:
        """Write the body."""
        tasks = self.tasks(batch)
        tasks.run(_Emitter(self, tasks.chunk, operands).task)


class _Emitter:
    """Writes the loops of one kernel."""

    def __init__(self, kernel: DepthwiseDot, chunk: int, operands: Operands) -> None:
        self.kernel, self.spec, self.isa = kernel, kernel.spec, kernel.isa
        self.operands, self.data, self.weight = operands, operands.data, operands.weight
        self.dtype = kernel.stored.dtype
        self.pitch = (self.spec.padding[1] + self.spec.width + self.spec.padding[3]) * _CHANNELS
        self.span = (self.spec.kernel[0] - 1) * self.spec.dilation[0] + 1
        self.in_rows = (chunk - 1) * self.spec.stride[0] + self.span
        self.row_bytes = kernel.tiles * kernel.quads * 4 * self.isa.unit

    def task(self, image: Expr, first: Expr, count: Expr) -> None:
        """Some output rows of one image."""
        spec = self.spec
        in_rows = (count - 1) * spec.stride[0] + self.span
        blocks = spec.out_channels // _CHANNELS
        # The last vector of a row reads behind the row, for pixels that it does not store.
        slack = _PIXELS * spec.stride[1] * _CHANNELS
        window = ir.allocate((blocks * self.in_rows * self.pitch + slack,), self.dtype)
        self.copy(window, image, first * spec.stride[0] - spec.padding[0], in_rows)
        ring = ir.allocate((self.span * self.row_bytes,), self.dtype)
        with ir.loop(blocks) as block, ir.loop(in_rows) as row:
            with ir.loop(self.kernel.tiles) as tile:
                self.order(window, ring, (block * self.in_rows + row) * self.pitch, row, tile)
            ahead = row - (self.span - 1)
            with ir.when(ir.both(ahead >= 0, ahead % spec.stride[0] == 0)):
                self.row(ring, image, block, row, first + ahead // spec.stride[0])

    def copy(self, window: Any, image: Expr, first: Expr, in_rows: Expr) -> None:
        """Copy input rows, block by block, with their padding."""
        spec, blocks = self.spec, self.spec.out_channels // _CHANNELS
        zero = ir.constant(self.kernel.stored_zero, self.dtype, _CHANNELS)

        def put(value: Expr, row: Expr, x: Expr, block: Expr) -> None:
            place = (block * self.in_rows + row) * self.pitch + x * _CHANNELS
            ir.store(window, value, [place], _CHANNELS)

        def blank(row: Expr, start: int, count: int) -> None:
            if count:
                with ir.loop(count) as x, ir.loop(blocks) as block:
                    put(zero, row, start + x, block)

        left, right = spec.padding[1], spec.padding[3]
        with ir.loop(in_rows) as row:
            is_inside = ir.both(first + row >= 0, first + row < spec.height)
            with ir.choose(is_inside) as (inside, outside):
                with inside:
                    blank(row, 0, left)
                    with ir.loop(spec.width) as x, ir.loop(blocks) as block:
                        value = ir.load(self.data, [image, first + row, x, block * _CHANNELS], _CHANNELS)
                        if self.kernel.flip:
                            value = ir.flip_sign(value, spec.input.dtype, _CHANNELS)
                        put(value, row, left + x, block)
                    blank(row, left + spec.width, right)
                with outside:
                    blank(row, 0, left + spec.width + right)

    def order(self, window: Any, ring: Any, origin: Expr, row: Expr, tile: Expr) -> None:
        """Bring the places of four pixels under one kernel row into the order of the instructions."""
        spec, dtype, unit, stride = self.spec, self.dtype, self.isa.unit, self.spec.stride[1]
        start = row % self.span * self.row_bytes
        for quad in range(self.kernel.quads):
            places = []
            for tap in range(min(4, spec.kernel[1] - quad * 4)):
                place = origin + (tile * (_PIXELS * stride) + (quad * 4 + tap)) * _CHANNELS
                if stride == 1:
                    value = ir.load(window, [place], unit)
                else:
                    pixels = [
                        ir.load(window, [place + p * stride * _CHANNELS], _CHANNELS) for p in range(_PIXELS)
                    ]
                    value = ir.shuffle(pixels, range(unit))
                places.append(ir.hold(value, dtype, unit))
            # Places beyond the kernel meet zero weights: any value will do.
            places += [places[-1]] * (4 - len(places))
            first = [ir.hold(_unpack(places[0], places[1], 1, high), dtype, unit) for high in (False, True)]
            second = [ir.hold(_unpack(places[2], places[3], 1, high), dtype, unit) for high in (False, True)]
            for vector in range(4):
                ordered = _unpack(first[vector // 2], second[vector // 2], 2, vector % 2 == 1)
                target = start + ((tile * self.kernel.quads + quad) * 4 + vector) * unit
                ir.store(ring, ordered, [target], unit)

    def row(self, ring: Any, image: Expr, block: Expr, row: Expr, y: Expr) -> None:
        """One output row of one block of channels; `row` is the last input row it needs."""
        vectors = -(-self.kernel.tiles // -(-self.kernel.tiles // _VECTORS))
        pixels = vectors * _PIXELS
        full, rest = divmod(self.spec.out_width, pixels)
        with ir.loop(full) as tile:
            self.tile(ring, [image, y, tile * pixels], block, row, tile * vectors, pixels)
        if rest:
            self.tile(ring, [image, y, full * pixels], block, row, full * vectors, rest)

    def tile(
        self, ring: Any, where: Sequence[Expr], block: Expr, row: Expr, first: Expr, pixels: int
    ) -> None:
        """Some pixels of one output row; `first` counts the vectors of pixels in front of them."""
        spec, isa, quads, unit = self.spec, self.isa, self.kernel.quads, self.isa.unit
        channel = block * _CHANNELS
        groups = -(-pixels // _PIXELS)
        held = ir.Registers(groups * 4, "int32", isa.lanes)
        for vector in range(4):
            begin = ir.hold(self.constants(self.operands.compensation, channel, vector), "int32", isa.lanes)
            for group in range(groups):
                held[group * 4 + vector] = begin
        for ky in range(spec.kernel[0]):
            start = (row + (ky * spec.dilation[0] + 1)) % self.span * self.row_bytes
            for quad in range(quads):
                index = (block * spec.kernel[0] + ky) * quads + quad
                for vector in range(4):
                    four = ir.load(self.weight, [index * unit + vector * 16], 16)
                    weights = ir.hold(ir.repeat(four, 16, _PIXELS), "int8", unit)
                    for group in range(groups):
                        place = start + (((first + group) * quads + quad) * 4 + vector) * unit
                        slot = group * 4 + vector
                        held[slot] = isa.dot(held[slot], ir.load(ring, [place], unit), weights)
        scale, bias = (
            [ir.hold(self.constants(buffer, channel, vector), "float32", isa.lanes) for vector in range(4)]
            for buffer in (self.operands.scale, self.operands.bias)
        )
        for group in range(groups):
            values = []
            for vector in range(4):
                total = ir.cast(held[group * 4 + vector], "float32", isa.lanes)
                value = ir.fma(total, scale[vector], bias[vector], isa.lanes)
                values.append(ir.hold(value, "float32", isa.lanes))
            at = [where[0], where[1], where[2] + group * _PIXELS]
            self.store(values, at, channel, min(_PIXELS, pixels - group * _PIXELS))

    def constants(self, buffer: Any, channel: Expr, vector: int) -> Expr:
        """Values of four channels, the same for the four pixels."""
        return ir.repeat(ir.load(buffer, [channel + vector * 4], 4), 4, _PIXELS)

    def store(self, values: Sequence[Expr], where: Sequence[Expr], channel: Expr, pixels: int) -> None:
        """The epilogue: whole pixels where bytes are stored, else four channels at a time."""
        image, y, x = where
        epilogue, lanes = self.spec.epilogue, self.isa.lanes
        if epilogue.residual is epilogue.branch is None and all(
            isinstance(kind, QParams) for kind in epilogue.outputs
        ):
            for output, kind in zip(self.operands.outputs, epilogue.outputs, strict=True):
                assert isinstance(kind, QParams)
                wide = [integers(value, kind, lanes, epilogue.clip, self.isa) for value in values]
                packed = ir.hold(self.isa.narrow(wide, kind.dtype, in_order=False), kind.dtype, 4 * lanes)
                for p in range(pixels):
                    part = ir.part(packed, p * _CHANNELS, _CHANNELS)
                    ir.store(output, part, [image, y, x + p, channel], _CHANNELS)
            return
        for p in range(pixels):
            for vector in range(4):
                at = [image, y, x + p, channel + vector * 4]
                finish(
                    ir.part(values[vector], p * 4, 4),
                    epilogue,
                    self.operands.residual,
                    self.operands.outputs,
                    at,
                    4,
                )


def _unpack(a: Expr, b: Expr, size: int, high: bool) -> Expr:
    """Elements of `size` bytes of two 64-byte vectors in turn, from the low or the high half of each lane."""
    order = []
    for lane in range(4):
        for element in range(8 // size):
            begin = lane * 16 + (8 if high else 0) + element * size
            order += [*range(begin, begin + size), *range(64 + begin, 64 + begin + size)]
    return ir.shuffle([a, b], order)
