"""Linear layers whose inputs are cut into groups with scales of their own, and whose rows may have grids of their own, or be float32.

The loops are those of :mod:`tvm_backend.kernels.cpu.linear`, group by group: exact integer sums in registers, then one multiplication and
addition in float32 for each group and output.  Rows of float32 are multiplied by weights that are made float32 in registers: what is read
from memory are their bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tvm_backend.kernels import tir
from tvm_backend.kernels.arithmetic import apply_epilogue, fma32
from tvm_backend.kernels.cpu import ir
from tvm_backend.kernels.cpu.isa import InstructionSet
from tvm_backend.kernels.cpu.linear import Linear, LinearEmitter
from tvm_backend.kernels.cpu.packing import WeightLayout
from tvm_backend.kernels.cpu.sums import Sums
from tvm_backend.kernels.cpu.weighted import Operands, store_row
from tvm_backend.kernels.kernel import Machine
from tvm_backend.kernels.spec import Argument, GroupedLinearSpec, LinearSpec
from tvm_backend.kernels.tir import Expr
from tvm_backend.kernels.weights import zero_point_sums

__all__ = ["GroupedLinear", "RealLinear", "reference"]


def reference(
    spec: GroupedLinearSpec,
    data: NDArray[Any],
    weight: NDArray[Any],
    scale: NDArray[Any],
    bias: NDArray[Any],
    *further: NDArray[Any] | None,
) -> tuple[NDArray[Any], ...]:
    """What every kernel computes, in numpy, with float32 data up to the order of sums: data (N, C_in), weight (C_out, C_in), scale (groups, C_out), the grids for tokens, the residual."""
    grid = further[0] if spec.tokens else None
    residual = further[spec.tokens] if len(further) > spec.tokens else None
    zero = grid[:, 1:].astype(np.float64) if grid is not None else 0 if spec.real else spec.input.zero_point
    shifted = data.astype(np.float64) - zero
    run = spec.in_features // spec.groups
    value = np.zeros((len(data), spec.out_features), np.float32)
    for group in range(spec.groups):
        part = slice(group * run, (group + 1) * run)
        # Products of bytes sum exactly in float64, whose matrix product is fast.
        total = shifted[:, part] @ weight[:, part].T.astype(np.float64)
        sums = total if spec.real else total.astype(np.int64).astype(np.int32)
        value = fma32(sums.astype(np.float32), scale[group], value)
    value = value + bias if grid is None else fma32(value, grid[:, :1], bias)
    return apply_epilogue(value, spec.epilogue, residual)


@dataclass(frozen=True)
class GroupedLinear(Linear):
    """Generator of the kernel for one :class:`GroupedLinearSpec`."""

    spec: GroupedLinearSpec

    @property
    def run(self) -> int:
        """Inputs of a group."""
        return self.spec.in_features // self.spec.groups

    @property
    def layout(self) -> WeightLayout:
        """How the weights are packed: each group filled up with zeros until the unpacking of bits comes round."""
        layout = super().layout
        share = 8 // layout.bits
        whole = math.lcm(share, layout.vectors) // layout.vectors * self.isa.group
        groups = self.spec.groups
        return replace(layout, runs=groups, run=-(-self.run // whole) * whole, spans=groups)

    @property
    def pitch(self) -> int:
        """Inputs that are read of a row: the last group as far as it is filled up."""
        return max(self.spec.in_features, (self.spec.groups - 1) * self.run + self.layout.run)

    def stretched(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Weights of shape (C_out, C_in): one stretch for each group."""
        parts = np.asarray(weight).reshape(self.spec.out_features, self.spec.groups, self.run)
        return np.pad(parts, ((0, 0), (0, 0), (0, self.layout.run - self.run)))[None]

    @property
    def _channels(self) -> int:
        return self.layout.blocks * self.layout.block_channels

    def channelwise(self, values: NDArray[Any]) -> NDArray[Any]:
        """Numbers (groups, C_out) with zeros for the channels that fill up the last block."""
        return np.pad(values, ((0, 0), (0, self._channels - self.spec.out_features)))

    def compensation(self, weight: NDArray[Any]) -> NDArray[np.int32]:
        """What is added to the sums of each group; for tokens it is multiplied by the zero point of the row."""
        parts = np.asarray(weight).reshape(self.spec.out_features, self.spec.groups, self.run)
        zero = 1 if self.spec.tokens else self.stored_zero
        sums = [zero_point_sums(parts[:, group], zero) for group in range(self.spec.groups)]
        result: NDArray[np.int32] = self.channelwise(np.stack(sums))
        return result

    def arguments(self, batch: Expr) -> list[Argument]:
        """The kernel's arguments, in order; compensation and scale for each group."""
        shape = (self.spec.groups, self._channels)
        return [
            (name, shape if name in ("compensation", "scale") else own, dtype)
            for name, own, dtype in super().arguments(batch)
        ]

    def emit(self, batch: Expr, operands: Operands) -> None:
        """Write the body."""
        _Emitter(self, batch, operands).emit()


@dataclass(frozen=True)
class _RowOperands(Operands):
    """The epilogue of one row, whose sums have their scales already but for its own."""

    row_scale: Expr | None = None

    def scaled(self, total: Expr, channel: Expr, lanes: int) -> Expr:
        """A vector of scaled sums with the scale of the row and the bias."""
        bias = tir.load(self.bias, [channel], lanes)
        if self.row_scale is None:
            return total + bias
        return ir.fma(total, tir.broadcast(self.row_scale, lanes), bias, lanes)


@dataclass(frozen=True)
class RealLinear(GroupedLinear):
    """The same for rows of float32."""

    @classmethod
    def takes(cls, spec: LinearSpec, isa: Machine) -> bool:
        """Whether the rows are float32."""
        return isinstance(spec, GroupedLinearSpec) and spec.real

    @classmethod
    def make(cls, spec: LinearSpec, isa: InstructionSet) -> Self:
        """On vectors that take one input at a time."""
        return replace(super().make(spec, isa), isa=replace(isa.vector, group=1))

    def for_weight(self, weight: NDArray[Any]) -> Self:
        """The same: products of float32 are as fast for any weight."""
        return self

    @property
    def flip(self) -> bool:
        """Numbers have no other sign to be stored with."""
        return False

    @property
    def remark(self) -> str:
        """Nothing."""
        return ""

    def emit(self, batch: Expr, operands: Operands) -> None:
        """Write the body."""
        _RealEmitter(self, batch, operands).emit()


class _Emitter(LinearEmitter):
    """Writes the loops of one kernel."""

    linear: GroupedLinear
    spec: GroupedLinearSpec

    def tile(self, source: Any, block: Expr, row: Expr, rows: int) -> None:
        """One register tile, group by group."""
        layout, lanes, vectors = self.layout, self.isa.lanes, self.layout.vectors
        channel = block * layout.block_channels
        zeros = self.zeros(row, rows)
        values = ir.Registers(rows * vectors, "float32", lanes)
        for slot in range(rows * vectors):
            values[slot] = tir.constant(0, "float32", lanes)

        def group(number: Expr) -> None:
            shifts = [
                tir.load(self.operands.compensation, [number, channel + v * lanes], lanes)
                for v in range(vectors)
            ]
            begin = [tir.constant(0, "int32", lanes)] * vectors if zeros else shifts
            held = self.sums(begin * rows)
            self.products(held, source, block, row, rows, number, number * self.linear.run)
            for v in range(vectors):
                factor = tir.load(self.operands.scale, [number, channel + v * lanes], lanes)
                factor, shift = ir.hold(factor, "float32", lanes), ir.hold(shifts[v], "int32", lanes)
                for r in range(rows):
                    slot = r * vectors + v
                    total = held[slot]
                    if zeros:
                        total = total + shift * tir.broadcast(zeros[r], lanes)
                    values[slot] = ir.fma(self.real(total), factor, values[slot], lanes)

        if self.spec.groups == 1:
            group(0)
        else:
            with tir.loop(self.spec.groups) as number:
                group(number)
        given = {field.name: getattr(self.operands, field.name) for field in fields(Operands)}
        for r in range(rows):
            scale = tir.load(self.operands.grid, [row + r, 0]) if zeros else None
            operands = _RowOperands(**given, row_scale=scale)
            totals = [values[r * vectors + v] for v in range(vectors)]
            store_row(operands, layout, totals, [row + r], channel, block, compensated=True)

    def real(self, total: Expr) -> Expr:
        """A vector of sums as float32."""
        return tir.cast(total, "float32", self.isa.lanes)

    def zeros(self, row: Expr, rows: int) -> Sequence[Expr]:
        """The zero points of rows with grids of their own, as the instructions see the integers; none of others."""
        if not self.spec.tokens:
            return []
        offset = tir.int32(128 if self.flip else 0)
        read = [tir.cast(tir.load(self.operands.grid, [row + r, 1]), "int32") - offset for r in range(rows)]
        return [ir.hold(zero, "int32", 1) for zero in read]


class _RealSums(Sums):
    """Sums of float32 in registers."""

    def __init__(self, isa: InstructionSet, count: int) -> None:
        super().__init__(replace(isa, depth=1), [], 1)
        self._held = ir.Registers(count, "float32", isa.lanes)
        for slot in range(count):
            self._held[slot] = tir.constant(0, "float32", isa.lanes)

    def add(self, slot: int, activations: Expr, weights: Expr) -> None:
        """Add products to a sum."""
        lanes = self.isa.lanes
        factor, held = tir.cast(weights, "float32", lanes), self._held[slot]
        fused = ir.fma(activations, factor, held, lanes) if self.isa.fuses else held + activations * factor
        self._held[slot] = fused


class _RealEmitter(_Emitter):
    """Writes the loops over rows of float32."""

    def activations(self, source: Any, indices: Sequence[Expr]) -> Expr:
        """One number, in every lane."""
        return tir.broadcast(tir.load(source, indices), self.isa.lanes)

    def sums(self, begin: Sequence[Expr]) -> Sums:
        """From zero on."""
        return _RealSums(self.isa, len(begin))

    def real(self, total: Expr) -> Expr:
        """They are float32."""
        return total
