"""Dense and grouped convolution with AMX tiles: a matrix product whose rows are pixels.

Nothing is gathered for that: a tile takes its rows at any distance, so the rows are the pixels where they lie, channels
last, and a stretch under the kernel is cut into pieces of 64 bytes.  The last piece of a stretch starts early enough to
end with it, and meets zero weights where it overlaps the one in front; the last tile of pixels starts early as well, and
computes some pixels twice.  So tiles are always full, and nothing beyond the input is read.

Without strides the rows of the window, padding included, are one long row of pixels.  What is computed for the places
between two output rows is not stored.  See :mod:`tvm_backend.kernels.cpu.tiles` for the inner loop and its floor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from tvm_backend.kernels import tir
from tvm_backend.kernels.cpu.conv2d import ConvEmitter, DirectConv, Rows
from tvm_backend.kernels.cpu.isa import Amx, InstructionSet
from tvm_backend.kernels.cpu.packing import WeightLayout
from tvm_backend.kernels.cpu.tiles import DEPTH, ROWS, TileProduct
from tvm_backend.kernels.cpu.weighted import Operands, store_row
from tvm_backend.kernels.kernel import Machine
from tvm_backend.kernels.spec import ConvSpec
from tvm_backend.kernels.tir import Expr

__all__ = ["AmxConv"]

_WORTHWHILE = 192
"""Useful products a cycle from which tiles are taken; 512-bit vectors do 128 at best, tiles 1024."""


@dataclass(frozen=True)
class AmxConv(DirectConv):
    """Generator of the kernel for one :class:`ConvSpec`."""

    # Tiles work from the second cache as fast as from the first one.
    window_bytes: ClassVar[int] = 256 * 1024
    task_macs: ClassVar[int] = 16_000_000

    @classmethod
    def make(cls, spec: ConvSpec, isa: InstructionSet) -> Self:
        """The generator on tiles."""
        return cls(spec, isa)

    @classmethod
    def takes(cls, spec: ConvSpec, isa: Machine) -> bool:
        """Whether there are tiles, and enough of each is used."""
        if not isinstance(isa, Amx):
            return False
        kernel = cls(spec, isa)
        channels = spec.out_channels // spec.groups
        padded = kernel.layout.blocks * kernel.vectors * isa.lanes
        useful = kernel.stretches[1] / kernel.pieces * isa.lanes * kernel.tile_rows / ROWS * channels / padded
        if kernel.is_flat:
            useful *= spec.out_width / kernel.pixel_pitch
        return useful >= _WORTHWHILE

    @property
    def flip(self) -> bool:
        """Never: there is an instruction for int8 activations."""
        return False

    @property
    def in_place(self) -> bool:
        """Only where an image's pixels form one long row."""
        return self.pointwise

    @property
    def pointwise(self) -> bool:
        """Whether an image's pixels form one long row that is read where it lies."""
        spec, run = self.spec, self.stretches[1]
        plain = spec.kernel == spec.stride == (1, 1) and not any(spec.padding)
        return plain and (run >= DEPTH or run % 4 == 0)

    @property
    def is_flat(self) -> bool:
        """Whether the rows of the window are taken as one long row."""
        return self.spec.stride == (1, 1) and not self.pointwise

    @property
    def pixel_pitch(self) -> int:
        """Pixels from one row of the window to the next."""
        return self.spec.padding[1] + self.spec.width + self.spec.padding[3]

    @property
    def pieces(self) -> int:
        """Pieces of a stretch."""
        return -(-self.stretches[1] // DEPTH)

    @property
    def depth(self) -> int:
        """Bytes of a piece."""
        return min(DEPTH, -(-self.stretches[1] // 4) * 4)

    @property
    def vectors(self) -> int:
        """Vectors of output channels in a block: few that are empty, and many for the epilogue."""
        needed = -(-(self.spec.out_channels // self.spec.groups) // self.isa.lanes)
        return min((4, 3, 2, 1), key=lambda vectors: -(-needed // vectors) * (vectors + 0.2))

    @property
    def layout(self) -> WeightLayout:
        """How the weights are packed."""
        return replace(super().layout, run=self.pieces * self.depth)

    def pack_weight(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Pack weights of shape (C_out, C_in / groups, kernel height, kernel width)."""
        whole = self.stretched(weight)
        run = self.stretches[1]
        padded = np.zeros((*whole.shape[:-1], self.layout.run), whole.dtype)
        fitting = (self.pieces - 1) * DEPTH
        padded[..., :fitting] = whole[..., :fitting]
        # The last piece ends with the stretch; a single one begins with it.
        end = padded.shape[-1] if fitting else run
        padded[..., end - (run - fitting) : end] = whole[..., fitting:]
        return self.layout.pack(padded)

    @property
    def tile_rows(self) -> int:
        """Pixels in a tile."""
        if self.pointwise:
            return min(ROWS, self.out_grid[1])
        width = self.spec.out_width
        if not self.is_flat:
            return -(-width // -(-width // ROWS))
        tasks = self.tasks(1)
        fewest = tasks.units // tasks.per_image
        return min(ROWS, (fewest - 1) * self.pixel_pitch + width)

    @property
    def tile(self) -> tuple[int, int]:
        """Vectors, and pixels in two tiles."""
        return self.vectors, 2 * self.tile_rows

    def emit(self, batch: Expr, operands: Operands) -> None:
        """Write the body."""
        _Emitter(self, batch, operands).emit()


class _Emitter(ConvEmitter):
    """Writes the loops of one kernel."""

    conv: AmxConv

    def __init__(self, conv: AmxConv, batch: Expr, operands: Operands) -> None:
        super().__init__(conv, batch, operands)
        self.product = TileProduct(conv.tile_rows, conv.depth, conv.vectors, self.spec.input.signed)
        self.staging: Any = None

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Around what one thread does: it shapes the tiles once."""
        with self.product.configured():
            self.staging = tir.allocate((self.product.staged,), "int32")
            yield

    def block(self, rows: Rows, block: Expr, panel: Any, start: Expr) -> None:
        """All tiles of one block of output channels in one chunk."""
        conv, length = self.conv, self.product.rows
        if conv.pointwise:
            tiles = -(-self.width // length)
            with tir.loop(rows.count) as index:
                self.pair(rows, block, panel, start, rows.first + index, tiles, self.width)
            return
        if conv.is_flat:
            line = (rows.count - 1) * conv.pixel_pitch + self.width
            tiles = (line + (length - 1)) // length
        else:
            line = self.width
            tiles = rows.count * -(-line // length)
        with tir.loop((tiles + 1) // 2) as index:
            self.pair(rows, block, panel, start, index, tiles, line)

    def pair(
        self, rows: Rows, block: Expr, panel: Any, start: Expr, index: Expr, tiles: Expr, line: Expr
    ) -> None:
        """Two tiles of pixels, the second one the last again if there is none: sums, then the epilogue.

        `line` is the number of pixels in a row; there are several rows with strides only.
        """
        conv, spec, layout, product = self.conv, self.spec, self.layout, self.product
        group, inner = block // layout.blocks, block % layout.blocks
        if layout.groups == 1:
            group, inner = 0, block
        channel = group * layout.out_channels + inner * layout.block_channels
        by_rows = not (conv.pointwise or conv.is_flat)
        per_row = -(-self.width // product.rows) if by_rows else 0
        places = []
        for number in (index * 2, tir.least(index * 2 + 1, tiles - 1)):
            row, number = (number // per_row, number % per_row) if by_rows else (0, number)
            places.append((row, tir.least(number * product.rows, line - product.rows)))
        pixel = spec.stride[1] * spec.in_channels
        pitch = spec.stride[0] * self.window.pitch
        origins = [row * pitch + x * pixel + group * (spec.in_channels // spec.groups) for row, x in places]
        for vectors in product.pairs():
            product.clear(vectors)
            with tir.loop(layout.runs) as run, tir.loop(conv.pieces) as piece:
                offset = self.run_offset(run) + self.piece_offset(piece)
                lead = [rows.image, 0, 0] if conv.pointwise else []
                inputs = [(rows.buffer, [*lead, origin + offset]) for origin in origins]
                weights = start + (run * conv.pieces + piece) * product.step_bytes
                product.step(vectors, inputs, pixel, panel, weights)
            product.store(vectors, self.staging)
        for tile, (row, x) in enumerate(places):
            with tir.loop(product.rows) as p:
                totals = product.sums(self.staging, tile, p)
                y, column = rows.first + row, x + p
                if conv.pointwise:
                    y = 0
                if conv.is_flat:
                    y, column = rows.first + column // conv.pixel_pitch, column % conv.pixel_pitch
                with tir.when(column < self.width if conv.is_flat else True):
                    store_row(
                        self.operands,
                        layout,
                        totals,
                        [rows.image, y, column],
                        channel,
                        inner,
                        compensated=False,
                    )

    def piece_offset(self, piece: Expr) -> Expr:
        """Where a piece begins in its stretch."""
        run = self.conv.stretches[1]
        if self.conv.pieces == 1 or run % DEPTH == 0:
            return piece * DEPTH
        return tir.least(piece * DEPTH, run - DEPTH)
