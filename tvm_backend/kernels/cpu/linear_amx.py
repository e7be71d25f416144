"""Fully connected layers with AMX tiles from sixteen rows on; fewer rows take 512-bit vectors.

Both read the same packed weights and the same rows: uint8, lengthened to whole tiles.  The last tile of rows starts
early enough to end with the last row, and computes some rows twice.  See :mod:`tvm_backend.kernels.cpu.tiles` for the inner
loop and its floor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tvm_backend.kernels import tir
from tvm_backend.kernels.cpu.isa import Amx, InstructionSet
from tvm_backend.kernels.cpu.linear import Linear, LinearEmitter
from tvm_backend.kernels.cpu.packing import WeightLayout
from tvm_backend.kernels.cpu.tiles import DEPTH, ROWS, TileProduct
from tvm_backend.kernels.cpu.unpack import unpack_block
from tvm_backend.kernels.cpu.weighted import Operands, store_row
from tvm_backend.kernels.kernel import Machine
from tvm_backend.kernels.spec import LinearSpec
from tvm_backend.kernels.tir import Expr

__all__ = ["AmxLinear"]


@dataclass(frozen=True)
class AmxLinear(Linear):
    """Generator of the kernel for one :class:`LinearSpec`."""

    @classmethod
    def make(cls, spec: LinearSpec, isa: InstructionSet) -> Self:
        """The generator on tiles."""
        return cls(spec, isa)

    @classmethod
    def takes(cls, spec: LinearSpec, isa: Machine) -> bool:
        """Whether there are tiles, and may be enough rows to fill one."""
        return isinstance(isa, Amx) and (spec.batch is None or spec.batch >= ROWS)

    @property
    def pieces(self) -> int:
        """Tiles that a row is cut into."""
        return -(-self.spec.in_features // DEPTH)

    @property
    def depth(self) -> int:
        """Bytes of such a piece."""
        return -(-self.spec.in_features // (4 * self.pieces)) * 4

    @property
    def layout(self) -> WeightLayout:
        """How the weights are packed; ``run`` counts the zeros behind a row."""
        return replace(super().layout, run=self.pieces * self.depth)

    def pack_weight(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Pack weights of shape (C_out, C_in)."""
        return super().pack_weight(np.pad(weight, ((0, 0), (0, self.layout.run - self.spec.in_features))))

    @property
    def unpacking(self) -> str:
        """Each weight is used for a few rows only, or unpacked into a block that tiles read."""
        return "in registers, or by block" if self.layout.bits < 8 else ""

    def emit(self, batch: Expr, operands: Operands) -> None:
        """Write the body."""
        _Emitter(self, batch, operands).emit()


class _Emitter(LinearEmitter):
    """Writes the loops of one kernel."""

    def __init__(self, linear: AmxLinear, batch: Expr, operands: Operands) -> None:
        super().__init__(linear, batch, operands)
        self.pieces = linear.pieces
        self.product = TileProduct(ROWS, linear.depth, linear.vectors, signed=False)

    def source(self) -> Any:
        """The rows as uint8 and lengthened, so that tiles and vectors read the same."""
        flip, self.flip = self.flip, False
        return self.copied(flip) if flip or self.pitch != self.spec.in_features else self.data

    def task(self, source: Any, block: Expr) -> None:
        """All rows for one block of output channels."""
        if isinstance(self.batch, int):
            self.by_tiles(source, block)
            return
        with tir.choose(self.batch >= ROWS) as (many, few):
            with many:
                self.by_tiles(source, block)
            with few:
                super().task(source, block)

    def by_tiles(self, source: Any, block: Expr) -> None:
        """Two tiles of rows at a time, the second one the last again if there is none."""
        layout, product = self.layout, self.product
        panel, start = self.weight, block * layout.block_bytes
        if layout.bits < 8:
            panel, start = tir.allocate((layout.block_bytes,), "int8"), 0
            unpack_block(layout, self.weight, block, panel, 0)
        channel = block * layout.block_channels
        with product.configured():
            staging = tir.allocate((product.staged,), "int32")
            with tir.loop((self.batch + (2 * ROWS - 1)) // (2 * ROWS)) as index:
                rows = [tir.least(index * (2 * ROWS) + tile * ROWS, self.batch - ROWS) for tile in range(2)]
                for vectors in product.pairs():
                    product.clear(vectors)
                    with tir.loop(self.pieces) as piece:
                        inputs = [(source, [row, piece * product.depth]) for row in rows]
                        weights = start + piece * product.step_bytes
                        product.step(vectors, inputs, self.pitch, panel, weights)
                    product.store(vectors, staging)
                for tile, row in enumerate(rows):
                    with tir.loop(ROWS) as r:
                        totals = product.sums(staging, tile, r)
                        store_row(self.operands, layout, totals, [row + r], channel, block, compensated=False)
