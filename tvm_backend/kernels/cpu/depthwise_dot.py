"""Depthwise convolution with dot-product instructions.

Such an instruction adds four products to each sum, so four places under the kernel have to lie side by side for every
channel (two, where it multiplies words: bytes are then unpacked with zeros).  They are taken from up to four rows above each other: channels lie side by side in memory, and unpacking bytes
of four rows within 128-bit lanes gives four vectors that hold a column of the kernel for each channel.  They serve every
output pixel that sees the column, each with weights of its own, and are never written to memory.  Narrowing within lanes
takes the results out of this order again, so nothing ever crosses lanes.

A vector of 64 bytes holds 64 channels of one pixel; where fewer are left over, 32 channels of two pixels or 16 of four.  One of 32
bytes holds 32 channels, or 16 of two pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tvm_backend.kernels import tir
from tvm_backend.kernels.cpu import ir
from tvm_backend.kernels.cpu.conv2d import reference
from tvm_backend.kernels.cpu.epilogue import finish, integers
from tvm_backend.kernels.cpu.isa import InstructionSet
from tvm_backend.kernels.cpu.quantity import Quantity
from tvm_backend.kernels.cpu.sums import Sums
from tvm_backend.kernels.cpu.tasks import Tasks
from tvm_backend.kernels.cpu.weighted import Operands, Weighted, vectors_for
from tvm_backend.kernels.kernel import Machine
from tvm_backend.kernels.spec import ConvSpec
from tvm_backend.kernels.tir import Expr
from tvm_backend.kernels.weights import as_int8

__all__ = ["DepthwiseDot", "reference"]

_TASK_MACS = 200_000
"""Work that is worth handing to a thread."""

_GROUPS = 14
"""Most vectors of pixels that are unrolled, half of it with shorter ones: neighbours share the columns of the input that both see."""


@dataclass(frozen=True)
class _Slice:
    """Channels that are worked on alike: `count` times `channels`, of `pixels` pixels in `unit` bytes, behind `first` channels."""

    first: int
    count: int
    channels: int
    chunk: int
    unit: int

    @property
    def pixels(self) -> int:
        """Pixels in a vector."""
        return self.unit // self.channels


@dataclass(frozen=True)
class DepthwiseDot(Weighted[ConvSpec]):
    """Generator of the kernel for one depthwise :class:`ConvSpec` on a set that multiplies groups of four."""

    @classmethod
    def takes(cls, spec: ConvSpec, isa: Machine) -> bool:
        """Whether channels are convolved on their own, sixteen or a multiple, on vectors of 32 or 64 bytes."""
        if not (spec.depthwise and isinstance(isa, InstructionSet)):
            return False
        isa = vectors_for(spec, isa)
        return isa.narrows and isa.group in (2, 4) and isa.lanes >= 8 and spec.out_channels % 16 == 0

    @classmethod
    def make(cls, spec: ConvSpec, isa: InstructionSet) -> Self:
        """The generator on the vectors that suit the values."""
        return cls(spec, vectors_for(spec, isa))

    @property
    def flip(self) -> bool:
        """Whether the data have another sign than what is multiplied; words are unsigned, being bytes unpacked with zeros."""
        words = self.isa.group == 2
        return self.spec.input.dtype != "uint8" if words else super().flip

    @property
    def unit(self) -> int:
        """Bytes of a vector of data."""
        return 4 * self.isa.lanes

    @property
    def steps(self) -> int:
        """Instructions for one kernel column."""
        return -(-self.spec.kernel[0] // self.isa.group)

    @property
    def slices(self) -> tuple[_Slice, ...]:
        """The channels, as full vectors and what is left over."""
        found: list[_Slice] = []
        first = chunk = 0
        unit = self.unit
        for channels in [size for size in (64, 32, 16) if size <= unit]:
            count = (self.spec.out_channels - first) // channels
            if count:
                found.append(_Slice(first, count, channels, chunk, unit))
            first, chunk = first + count * channels, chunk + count
        return tuple(found)

    @property
    def chunks(self) -> int:
        """Vectors that the channels fill."""
        return sum(piece.count for piece in self.slices)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the weights of a chunk."""
        return self.steps * self.spec.kernel[1] * 4 * self.isa.unit

    @property
    def weight_length(self) -> int:
        """Bytes of the packed weight."""
        return self.chunks * self.chunk_bytes

    def pack_weight(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Lay weights of shape (C, 1, kernel height, kernel width) out as [chunk][step][column][vector][lane][group]."""
        rows, columns = self.spec.kernel
        padded = np.zeros((weight.shape[0], self.steps * self.isa.group, columns), np.int8)
        padded[:, :rows] = as_int8(weight)[:, 0]
        ordered = padded.reshape(-1, self.steps, self.isa.group, columns)[self.order].transpose(
            0, 3, 5, 1, 2, 4
        )
        return np.ascontiguousarray(ordered.reshape(-1))

    @property
    def order(self) -> NDArray[np.intp]:
        """The channel in each lane, shape (chunks, 4, lanes)."""
        vector, lane = np.arange(4)[:, None], np.arange(self.isa.lanes)
        order = [
            piece.first + i * piece.channels + (16 * (lane // 4) + 4 * vector + lane % 4) % piece.channels
            for piece in self.slices
            for i in range(piece.count)
        ]
        return np.stack(order)

    def tasks(self, batch: Expr) -> Tasks:
        """Output rows put together to tasks."""
        return Tasks(batch, self.spec.out_height, self.spec.macs // self.spec.out_height, _TASK_MACS)

    def emit(self, batch: Expr, operands: Operands) -> None:
        """Write the body."""
        self.tasks(batch).run(_Emitter(self, operands).task)


class _Emitter:
    """Writes the loops of one kernel."""

    def __init__(self, kernel: DepthwiseDot, operands: Operands) -> None:
        self.kernel, self.spec, self.isa, self.operands = kernel, kernel.spec, kernel.isa, operands
        self.dtype = kernel.stored.dtype

    def task(self, image: Expr, first: Expr, count: Expr) -> None:
        """Some output rows of one image."""
        operands = self.operands
        constants = [
            self.constants(buffer) for buffer in (operands.compensation, operands.scale, operands.bias)
        ]
        with tir.loop(count) as row:
            for piece in self.kernel.slices:
                with tir.loop(piece.count) as i:
                    _Row(self, piece, i, image, first + row, constants).emit()

    def constants(self, source: Any) -> Any:
        """Values by channel, in the order of the lanes."""
        width = self.isa.lanes
        target = tir.allocate((self.kernel.chunks * self.kernel.unit,), source.dtype)
        for piece in self.kernel.slices:
            with tir.loop(piece.count) as i:
                for vector in range(4):
                    channel = piece.first + i * piece.channels + 4 * vector
                    places = [channel + 16 * lane % piece.channels for lane in range(width // 4)]
                    lanes = [tir.load(source, [place], 4) for place in places]
                    place = ((piece.chunk + i) * 4 + vector) * width
                    tir.store(target, tir.shuffle(lanes, range(width)), [place], width)
        return target


class _Row:
    """One output row of one chunk of channels."""

    def __init__(
        self, emitter: _Emitter, piece: _Slice, index: Expr, image: Expr, y: Expr, constants: Sequence[Any]
    ) -> None:
        self.emitter, self.piece, self.image, self.y = emitter, piece, image, y
        self.kernel, self.spec, self.isa = emitter.kernel, emitter.spec, emitter.isa
        self.channel, self.chunk = piece.first + index * piece.channels, piece.chunk + index
        self.compensation, self.scale, self.bias = constants
        self.unit = emitter.kernel.unit

    def emit(self) -> None:
        """Write all pixels, tile by tile; those at the borders know which columns are padding, the others have none."""
        groups = -(-self.spec.out_width // self.piece.pixels)
        most = _GROUPS if self.unit == 64 else _GROUPS // 2
        size = -(-groups // -(-groups // most))
        step = size * self.piece.pixels
        starts = range(0, groups * self.piece.pixels, step)
        inner = [start for start in starts if self.inside(start, step)]
        for start in starts:
            if start not in inner:
                self.tile(start, min(size, groups - start // self.piece.pixels), start)
            elif start == inner[0]:
                with tir.loop(len(inner)) as tile:
                    self.tile(start + tile * step, size, None)

    def inside(self, start: int, pixels: int) -> bool:
        """Whether no pixel of a tile sees anything beside the image."""
        spec = self.spec
        first = start * spec.stride[1] - spec.padding[1]
        last = first + (pixels - 1) * spec.stride[1] + (spec.kernel[1] - 1) * spec.dilation[1]
        return start + pixels <= spec.out_width and first >= 0 and last < spec.width

    def tile(self, x: Expr, groups: int, known: int | None) -> None:
        """Some vectors of pixels from `x` on, which is `known` at the borders."""
        spec, pixels, stride = self.spec, self.piece.pixels, self.spec.stride[1]
        uses: dict[int, list[tuple[int, int]]] = {}
        for group in range(groups):
            for kx in range(spec.kernel[1]):
                column = group * pixels * stride + kx * spec.dilation[1]
                uses.setdefault(column, []).append((group, kx))
        reach = (spec.kernel[1] - 1) * spec.dilation[1]
        held: dict[int, Sums] = {}
        for column in sorted(uses):
            taps = self.column(x, column, known)
            for group, kx in uses[column]:
                if group not in held:
                    held[group] = self.begin()
                for step, vectors in enumerate(taps):
                    for vector in range(4):
                        place = ((step * spec.kernel[1] + kx) * 4 + vector) * self.isa.unit
                        place = self.chunk * self.kernel.chunk_bytes + place
                        weights = self.isa.weights(self.emitter.operands.weight, [place])
                        held[group].add(vector, vectors[vector], weights)
            for group in [group for group in held if group * pixels * stride + reach == column]:
                left = pixels if known is None else min(pixels, spec.out_width - known - group * pixels)
                held[group].close()
                self.finish(held.pop(group), x + group * pixels, left)

    def begin(self) -> Sums:
        """Four vectors of sums, the zero point taken out."""
        lanes = self.isa.lanes
        begin = [
            tir.load(self.compensation, [(self.chunk * 4 + vector) * lanes], lanes) for vector in range(4)
        ]
        held = Sums(self.isa, begin, 1, self.kernel.steps * self.spec.kernel[1])
        held.open()
        return held

    def column(self, x: Expr, column: int, known: int | None) -> list[list[Expr]]:
        """The places under a kernel column for the pixels from `x` on: for each step four vectors."""
        spec, group, result = self.spec, self.isa.group, []
        for step in range(self.kernel.steps):
            rows = [
                self.held(self.places(ky, x, column, known))
                for ky in range(step * group, min(step * group + group, spec.kernel[0]))
            ]
            # Rows beyond the kernel meet zero weights: any value will do.
            rows += [rows[-1]] * (group - len(rows))
            pairs = [
                self.held(_unpack(a, b, 1, high, self.unit))
                for a, b in zip(rows[::2], rows[1::2], strict=True)
                for high in (False, True)
            ]
            if group == 4:
                vectors = [
                    _unpack(pairs[v // 2], pairs[2 + v // 2], 2, v % 2 == 1, self.unit) for v in range(4)
                ]
                result.append([self.held(vector) for vector in vectors])
                continue
            zeros, words = tir.constant(0, self.emitter.dtype, self.unit), self.unit // 2
            vectors = [_unpack(pairs[v // 2], zeros, 1, v % 2 == 1, self.unit) for v in range(4)]
            wide = [tir.reinterpret(tir.vector("int16", words), vector) for vector in vectors]
            result.append([ir.hold(vector, "int16", words) for vector in wide])
        return result

    def held(self, value: Expr) -> Expr:
        """A vector of data, computed once."""
        return ir.hold(value, self.emitter.dtype, self.unit)

    def places(self, ky: int, x: Expr, column: int, known: int | None) -> Expr:
        """One input place for each pixel and channel of a vector; the zero point outside of the image."""
        spec, piece = self.spec, self.piece
        zero = tir.cast(self.emitter.operands.zero, self.emitter.dtype)
        row = self.y * spec.stride[0] + (ky * spec.dilation[0] - spec.padding[0])
        padded = spec.padding[0] or spec.padding[2]
        nearest = tir.least(tir.larger(row, 0), spec.height - 1) if padded else row
        first = column - spec.padding[1]
        pixels = []
        for p in range(piece.pixels):
            at = first + p * spec.stride[1]
            if known is not None and not 0 <= known * spec.stride[1] + at < spec.width:
                pixels.append(tir.broadcast(zero, piece.channels))
                continue
            indices = [self.image, nearest, x * spec.stride[1] + at, self.channel]
            value = tir.load(self.emitter.operands.data, indices, piece.channels)
            if self.kernel.flip:
                value = ir.flip_sign(value, spec.input.dtype, piece.channels)
            pixels.append(value)
        value = pixels[0] if len(pixels) == 1 else tir.shuffle(pixels, range(self.unit))
        if not padded:
            return value
        outside = tir.broadcast(zero, self.unit)
        return tir.select(tir.all_of(row >= 0, row < spec.height), value, outside)

    def finish(self, held: Sums, x: Expr, pixels: int) -> None:
        """The epilogue: bytes of a whole vector at once, anything else four channels at a time."""
        lanes, operands = self.isa.lanes, self.emitter.operands
        epilogue = operands.epilogue
        channels = self.piece.channels
        values = []
        for vector in range(4):
            place = [(self.chunk * 4 + vector) * lanes]
            total = tir.cast(held[vector], "float32", lanes)
            value = ir.fma(
                total, tir.load(self.scale, place, lanes), tir.load(self.bias, place, lanes), lanes
            )
            values.append(ir.hold(value, "float32", lanes))
        if epilogue.residual is epilogue.branch is None and all(
            isinstance(kind, Quantity) for kind in epilogue.outputs
        ):
            for output, kind in zip(operands.outputs, epilogue.outputs, strict=True):
                assert isinstance(kind, Quantity)
                wide = [integers(value, kind, lanes, self.isa) for value in values]
                packed = self.isa.narrow(wide, kind.dtype, in_order=False)
                if channels < self.unit:
                    packed = ir.hold(packed, kind.dtype, self.unit)
                for p in range(pixels):
                    part = packed if channels == self.unit else ir.part(packed, p * channels, channels)
                    tir.store(output, part, [self.image, self.y, x + p, self.channel], channels)
            return
        for vector in range(4):
            for lane in range(pixels * channels // 16):
                pixel, channel = divmod(16 * lane, channels)
                where = [self.image, self.y, x + pixel, self.channel + channel + 4 * vector]
                value = ir.part(values[vector], lane * 4, 4)
                finish(value, epilogue, operands.residual, operands.outputs, where, 4)


def _unpack(a: Expr, b: Expr, size: int, high: bool, unit: int) -> Expr:
    """Elements of `size` bytes of two vectors of `unit` in turn, from the low or the high half of each 16 bytes."""
    order = []
    for lane in range(unit // 16):
        for element in range(8 // size):
            begin = lane * 16 + (8 if high else 0) + element * size
            order += [*range(begin, begin + size), *range(unit + begin, unit + begin + size)]
    return tir.shuffle([a, b], order)
