"""Fully connected layers: one row is a matrix-vector product bound by the weights, many rows a matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_backend.kernels import ir
from tvm_backend.kernels.arithmetic import apply_epilogue, scaled_sum
from tvm_backend.kernels.epilogue import chunks, finish, output_arguments, residual_argument
from tvm_backend.kernels.ir import Expr
from tvm_backend.kernels.isa import InstructionSet
from tvm_backend.kernels.packing import WeightLayout, storage_bits
from tvm_backend.kernels.spec import LinearSpec
from tvm_backend.kernels.tasks import run
from tvm_backend.kernels.unpack import lowest_values, unpacked

__all__ = ["Linear", "reference", "sums"]

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
class Linear:
    """Generator of the kernel for one specification.

    Parameters
    ----------
    spec : LinearSpec
        What to compute.
    isa : InstructionSet
        How products are summed.
    """

    spec: LinearSpec
    isa: InstructionSet

    @property
    def flip(self) -> bool:
        """Whether the data are int8 where the instruction set multiplies uint8."""
        return self.spec.input.signed and self.isa.unsigned

    @property
    def stored_zero(self) -> int:
        """The zero point of the activations as the instructions see them."""
        return self.spec.input.zero_point + (128 if self.flip else 0)

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
            bits=storage_bits(spec.weight_bits),
        )

    def pack_weight(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Pack weights of shape (C_out, C_in)."""
        return self.layout.pack(np.asarray(weight)[None, :, None, :])

    def arguments(self, batch: Expr) -> list[ir.Argument]:
        """Arguments of the kernel."""
        spec = self.spec
        per_channel = (spec.out_features,)
        out_shape = (batch, spec.out_features)
        return [
            ("data", (batch, spec.in_features), spec.input.dtype),
            ("weight", (self.layout.length,), self.layout.dtype),
            ("compensation", per_channel, "int32"),
            ("scale", per_channel, "float32"),
            ("bias", per_channel, "float32"),
            *residual_argument(spec.epilogue, out_shape),
            *output_arguments(spec.epilogue, out_shape),
        ]

    def build(self, name: str) -> Any:
        """The PrimFunc."""
        batch = ir.batch_extent(self.spec.batch)
        with ir.Function(name) as function:
            buffers = function.buffers(self.arguments(batch))
            _Emitter(self, batch, buffers).emit()
        return function.result


class _Emitter:
    """Writes the loops of one kernel."""

    def __init__(self, linear: Linear, batch: Expr, buffers: Sequence[Any]) -> None:
        self.linear, self.spec, self.isa, self.layout = linear, linear.spec, linear.isa, linear.layout
        self.batch = batch
        self.data, self.weight, self.compensation, self.scale, self.bias = buffers[:5]
        rest = list(buffers[5:])
        self.residual = rest.pop(0) if self.spec.epilogue.residual is not None else None
        self.outputs = rest

    def emit(self) -> None:
        """Write the whole body; threads share out the blocks of output channels."""
        spec, isa, layout = self.spec, self.isa, self.layout
        ragged = spec.in_features % isa.group
        source = self.data
        pitch = spec.in_features
        if ragged:
            # Rows are lengthened to whole groups, so that the last read stays inside.
            pitch = layout.steps * isa.group
            source = ir.allocate((self.batch, pitch), spec.input.dtype)
            with ir.loop(self.batch) as row:
                with ir.loop(spec.in_features) as i:
                    ir.store(source, ir.load(self.data, [row, i]), [row, i])
                with ir.loop(pitch - spec.in_features) as i:
                    ir.store(source, ir.constant(0, spec.input.dtype), [row, spec.in_features + i])
        rows = self.linear.rows

        def task(block: Expr) -> None:
            if rows > 1:
                with ir.loop(self.batch // rows) as index:
                    self.tile(source, block, index * rows, rows)
            rest = self.batch % rows if rows > 1 else self.batch
            if not isinstance(rest, int) or rest:
                with ir.loop(rest) as index:
                    self.tile(source, block, self.batch - rest + index, 1)

        alone = True if layout.blocks == 1 else self.batch * spec.macs < _TASK_MACS
        run(layout.blocks, task, alone)

    def tile(self, source: Any, block: Expr, row: Expr, rows: int) -> None:
        """One register tile: sums over all products, then the epilogue."""
        spec, layout, isa, vectors = self.spec, self.layout, self.isa, self.layout.vectors
        share = 8 // layout.bits
        channel = block * layout.block_channels
        exact = spec.out_features % layout.block_channels == 0
        held = ir.Registers(rows * vectors, "int32", isa.lanes)
        for slot in range(rows * vectors):
            held[slot] = ir.constant(0, "int32", isa.lanes)

        def multiply(step: Expr, v: int, weights: Expr) -> None:
            for r in range(rows):
                x = isa.activations(source, [row + r, step * isa.group], self.linear.flip)
                slot = r * vectors + v
                held[slot] = isa.dot(held[slot], x, weights)

        if layout.bits == 8:
            with ir.loop(layout.steps) as step:
                for v in range(vectors):
                    unit = block * layout.block_bytes + (step * vectors + v) * isa.unit
                    multiply(step, v, isa.weights(self.weight, [unit]))
        else:
            # Unpacked where they are used: each packed byte crosses the memory bus once.
            lowest = lowest_values(layout, self.weight, block)
            words = ir.vector("int32", isa.unit // 4)
            begin = block * (layout.block_bytes // share)
            packed_units, steps = layout.period // share, layout.period // vectors

            def period(index: Expr, limit: int) -> None:
                for source_unit in range(packed_units):
                    place = begin + (index * packed_units + source_unit) * isa.unit
                    raw = ir.load(self.weight, [place], isa.unit)
                    word = ir.hold(ir.reinterpret(words, raw), "int32", isa.unit // 4)
                    for position in range(share):
                        number = source_unit * share + position
                        if number >= limit:
                            continue
                        v = number % vectors
                        weights = unpacked(layout, word, position, lowest[v])
                        multiply(index * steps + number // vectors, v, ir.hold(weights, "int8", isa.unit))

            full, rest = divmod(layout.steps * vectors, layout.period)
            with ir.loop(full) as index:
                period(index, layout.period)
            if rest:
                period(full, rest)
        for r in range(rows):
            for v in range(vectors):
                self.store(held[r * vectors + v], row + r, block, channel, v, exact)

    def store(self, value: Expr, row: Expr, block: Expr, channel: Expr, v: int, exact: bool) -> None:
        """The epilogue of one vector of sums; in the last block some channels may not exist."""
        isa, layout = self.isa, self.layout
        in_last = layout.out_channels - (layout.blocks - 1) * layout.block_channels
        existing = max(0, min(isa.lanes, in_last - v * isa.lanes))

        def some(count: int) -> None:
            for begin, lanes in chunks(count, isa.lanes):
                self.finish(ir.part(value, begin, lanes), row, channel + (v * isa.lanes + begin), lanes)

        if exact:
            self.finish(value, row, channel + v * isa.lanes, isa.lanes)
        elif layout.blocks == 1:
            some(existing)
        else:
            with ir.choose(block == layout.blocks - 1) as (last, full):
                with last:
                    some(existing)
                with full:
                    self.finish(value, row, channel + v * isa.lanes, isa.lanes)

    def finish(self, total: Expr, row: Expr, channel: Expr, lanes: int) -> None:
        """Scale, bias and the rest of the epilogue."""
        value = ir.fma(
            ir.cast(total + ir.load(self.compensation, [channel], lanes), "float32", lanes),
            ir.load(self.scale, [channel], lanes),
            ir.load(self.bias, [channel], lanes),
            lanes,
        )
        finish(value, self.spec.epilogue, self.residual, self.outputs, [row, channel], lanes)
