"""Fully connected layers: one row is a matrix-vector product bound by the weights, many rows a matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tvm_backend.kernels import tir
from tvm_backend.kernels.arithmetic import apply_epilogue, scaled_sum
from tvm_backend.kernels.cpu import ir
from tvm_backend.kernels.cpu.isa import InstructionSet
from tvm_backend.kernels.cpu.packing import WeightLayout
from tvm_backend.kernels.cpu.sums import Sums
from tvm_backend.kernels.cpu.tasks import run
from tvm_backend.kernels.cpu.unpack import lowest_values, unpacked
from tvm_backend.kernels.cpu.weighted import Blocked, Operands, store_row, vectors_for
from tvm_backend.kernels.spec import LinearSpec
from tvm_backend.kernels.tir import Expr

__all__ = ["Linear", "LinearEmitter", "reference", "sums"]

_TASK_MACS = 400_000
"""Work that is worth handing to threads."""


def sums(spec: LinearSpec, data: NDArray[Any], weight: NDArray[Any]) -> NDArray[np.int32]:
    """Exact sums of products, ``sum((q - zero_point) * w)``; data (N, C_in), weight (C_out, C_in)."""
    shifted = data.astype(np.float64) - spec.input.zero_point
    # Products of bytes sum exactly in float64, whose matrix product is fast.
    return (shifted @ weight.T.astype(np.float64)).astype(np.int64).astype(np.int32)


def reference(
    spec: LinearSpec,
    data: NDArray[Any],
    weight: NDArray[Any],
    scale: NDArray[Any],
    bias: NDArray[Any],
    residual: NDArray[Any] | None = None,
) -> tuple[NDArray[Any], ...]:
    """What every linear kernel computes, in numpy; see :func:`sums` for shapes."""
    value = scaled_sum(sums(spec, data, weight), scale, bias)
    return apply_epilogue(value, spec.epilogue, residual)


@dataclass(frozen=True)
class Linear(Blocked[LinearSpec]):
    """Generator of the kernel for one :class:`LinearSpec`."""

    @classmethod
    def make(cls, spec: LinearSpec, isa: InstructionSet) -> Self:
        """The generator on the vectors that suit the values."""
        return cls(spec, vectors_for(spec, isa))

    @property
    def vectors(self) -> int:
        """Vectors of output channels in a register tile."""
        needed = -(-self.spec.out_features // self.isa.lanes)
        return min(needed, max(vectors for vectors, _ in self.isa.tiles))

    @property
    def rows(self) -> int:
        """Rows in a full register tile: a divisor of common batch sizes, so that few rows are left over."""
        most = max(rows for vectors, rows in self.isa.tiles if vectors >= self.vectors)
        most = 8 if most >= 8 else 4 if most >= 4 else most
        return most if self.spec.batch is None else min(most, self.spec.batch)

    @property
    def layout(self) -> WeightLayout:
        """How the weights are packed."""
        spec = self.spec
        return WeightLayout(
            isa=self.isa,
            out_channels=spec.out_features,
            groups=1,
            runs=1,
            run=spec.in_features,
            vectors=self.vectors,
            bits=spec.storage_bits,
        )

    def stretched(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Weights of shape (C_out, C_in): one group, one stretch."""
        return np.asarray(weight)[None, :, None, :]

    @property
    def pitch(self) -> int:
        """Inputs in a row that is lengthened to whole groups."""
        return self.layout.steps * self.isa.group

    @property
    def unpacking(self) -> str:
        """Each weight is used for a few rows only."""
        return "in registers" if self.layout.bits < 8 else ""

    def emit(self, batch: Expr, operands: Operands) -> None:
        """Write the body."""
        LinearEmitter(self, batch, operands).emit()


class LinearEmitter:
    """Writes the loops of one kernel."""

    def __init__(self, linear: Linear, batch: Expr, operands: Operands) -> None:
        self.linear, self.spec, self.isa, self.layout = linear, linear.spec, linear.isa, linear.layout
        self.batch, self.operands = batch, operands
        self.data, self.weight = operands.data, operands.weight
        self.flip = linear.flip

    def emit(self) -> None:
        """Write the whole body; threads share out the blocks of output channels."""
        source = self.source()
        alone = True if self.layout.blocks == 1 else self.batch * self.spec.macs < _TASK_MACS
        run(self.layout.blocks, lambda block: self.task(source, block), alone)

    def source(self) -> Any:
        """The rows, lengthened to whole groups so that the last read stays inside."""
        return self.data if self.pitch == self.spec.in_features else self.copied(False)

    @property
    def pitch(self) -> int:
        """Inputs in a lengthened row."""
        return self.linear.pitch

    def copied(self, flip: bool) -> Any:
        """A copy of the rows with zeros behind each; `flip` offsets them by 128."""
        spec = self.spec
        dtype = spec.input.flipped.dtype if flip else self.data.dtype
        copy = tir.allocate((self.batch, self.pitch), dtype)
        with tir.loop(self.batch) as row:
            with tir.loop(spec.in_features) as i:
                value = tir.load(self.data, [row, i])
                if flip:
                    value = ir.flip_sign(value, spec.input.dtype)
                tir.store(copy, value, [row, i])
            with tir.loop(self.pitch - spec.in_features) as i:
                tir.store(copy, tir.constant(0, dtype), [row, spec.in_features + i])
        return copy

    def task(self, source: Any, block: Expr) -> None:
        """All rows for one block of output channels."""
        rows = self.linear.rows
        if rows > 1:
            with tir.loop(self.batch // rows) as index:
                self.tile(source, block, index * rows, rows)
        rest = self.batch % rows if rows > 1 else self.batch
        if not isinstance(rest, int) or rest:
            with tir.loop(rest) as index:
                self.tile(source, block, self.batch - rest + index, 1)

    def tile(self, source: Any, block: Expr, row: Expr, rows: int) -> None:
        """One register tile: sums over all products, then the epilogue."""
        layout, vectors = self.layout, self.layout.vectors
        held = self.sums([tir.constant(0, "int32", self.isa.lanes)] * (rows * vectors))
        self.products(held, source, block, row, rows)
        for r in range(rows):
            totals = [held[r * vectors + v] for v in range(vectors)]
            channel = block * layout.block_channels
            store_row(self.operands, layout, totals, [row + r], channel, block, compensated=False)

    def activations(self, source: Any, indices: Sequence[Expr]) -> Expr:
        """What an instruction multiplies of a row, in every lane."""
        return self.isa.activations(source, indices, self.flip)

    def sums(self, begin: Sequence[Expr]) -> Sums:
        """Sums in registers for a tile, row by row."""
        layout = self.layout
        each = layout.period // layout.vectors if layout.bits < 8 else 1
        return Sums(self.isa, begin, 1, each)

    def products(
        self, held: Sums, source: Any, block: Expr, row: Expr, rows: int, run: Expr = 0, first: Expr = 0
    ) -> None:
        """Add the products of a stretch of the inputs: the one with the number `run`, which begins with input `first`."""
        layout, isa, vectors = self.layout, self.isa, self.layout.vectors
        share, units = 8 // layout.bits, layout.steps * layout.vectors

        def multiply(step: Expr, v: int, weights: Expr) -> None:
            for r in range(rows):
                x = self.activations(source, [row + r, first + step * isa.group])
                held.add(r * vectors + v, x, weights)

        if layout.bits == 8:
            begin = block * layout.block_bytes + run * (units * isa.unit)

            def words(step: Expr) -> None:
                for v in range(vectors):
                    place = begin + (step * vectors + v) * isa.unit
                    multiply(step, v, isa.weights(self.weight, [place]))

            held.loop(layout.steps, words)
            return
        # Unpacked where they are used: each packed byte crosses the memory bus once.
        each = layout.period // vectors
        lowest = lowest_values(layout, self.weight, block, run)
        integers = tir.vector("int32", isa.unit // 4)
        begin = block * (layout.block_bytes // share) + run * (units // share * isa.unit)
        packed_units = layout.period // share

        def period(index: Expr, limit: int) -> None:
            for source_unit in range(packed_units):
                place = begin + (index * packed_units + source_unit) * isa.unit
                raw = tir.load(self.weight, [place], isa.unit)
                word = ir.hold(tir.reinterpret(integers, raw), "int32", isa.unit // 4)
                for position in range(share):
                    number = source_unit * share + position
                    if number >= limit:
                        continue
                    v = number % vectors
                    weights = unpacked(layout, word, position, lowest[v])
                    multiply(index * each + number // vectors, v, ir.hold(weights, "int8", isa.unit))

        full, rest = divmod(units, layout.period)
        held.loop(full, lambda index: period(index, layout.period))
        if rest:
            with held.widened():
                period(full, rest)
