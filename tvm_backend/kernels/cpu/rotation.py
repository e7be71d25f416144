"""Rotations by Hadamard matrices: butterflies in registers and between the rows of a small scratch, then the core.

A row of 1536 features, 4 x 12 x 32, takes 20 operations for each of them, where two matrices of 48 and 32 rows take 80.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.tirx import PrimFunc

from tvm_backend.kernels import tir
from tvm_backend.kernels.arithmetic import apply_epilogue
from tvm_backend.kernels.cpu import ir
from tvm_backend.kernels.cpu.epilogue import finish_defined
from tvm_backend.kernels.cpu.generator import CpuGenerator
from tvm_backend.kernels.cpu.tasks import TASK_ELEMENTS, Tasks
from tvm_backend.kernels.spec import RotationSpec
from tvm_backend.kernels.tir import Expr

__all__ = ["Rotation", "reference"]

_HELD = 8
"""Vectors of butterflies at a time, of 16 registers and more."""

_SUMS = 12
"""Sums of products with the core at a time, likewise."""


def reference(spec: RotationSpec, data: NDArray[Any], *constants: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """What the kernel approximates, in float64."""
    factors, *core = (constant.astype(float) for constant in constants)
    x = (data.astype(float) * factors).reshape(-1, spec.outer, spec.core, spec.inner)
    if core:
        x = np.einsum("noci,cd->nodi", x, core[0])
    for axis, size in ((1, spec.outer), (3, spec.inner)):
        matrix: NDArray[Any] = np.ones((1, 1))
        while len(matrix) < size:
            matrix = np.kron([[1, 1], [1, -1]], matrix)
        x = np.moveaxis(np.moveaxis(x, axis, -1) @ matrix, -1, axis)
    return apply_epilogue(x.reshape(len(data), -1).astype(np.float32), spec.epilogue)


def _butterflies(values: Sequence[Expr], lanes: int) -> list[Expr]:
    """Vectors times Sylvester's matrix of as many rows."""
    held = list(values)
    step = 1
    while step < len(held):
        for first in range(len(held)):
            if not first & step:
                one, other = held[first], held[first | step]
                held[first] = ir.hold(one + other, "float32", lanes)
                held[first | step] = ir.hold(one - other, "float32", lanes)
        step *= 2
    return held


def _within(value: Expr, lanes: int) -> Expr:
    """The lanes of a vector times Sylvester's matrix of as many rows."""
    numbers = tir.ramp(tir.int32(0), lanes) if lanes > 1 else None
    step = 1
    while step < lanes:
        odd = (numbers // tir.constant(step, "int32", lanes)) % tir.constant(2, "int32", lanes)
        sign = tir.cast(tir.constant(1, "int32", lanes) - odd - odd, "float32", lanes)
        partner = tir.shuffle([value], [lane ^ step for lane in range(lanes)])
        value = ir.hold(partner + value * sign, "float32", lanes)
        step *= 2
    return value


@dataclass(frozen=True)
class Rotation(CpuGenerator[RotationSpec]):
    """Generator of the kernel for one :class:`RotationSpec`."""

    def build(self, name: str) -> PrimFunc:
        """The PrimFunc."""
        spec = self.spec
        batch = tir.batch_extent(spec.batch)
        with tir.Function(name) as function:
            data, factors, *rest = function.buffers(self.arguments(batch))
            core = rest.pop(0) if spec.core > 1 else None
            row = _Row(self, data, factors, core, rest)
            cost = spec.features * max(1, int(math.log2(spec.outer * spec.inner)) + spec.core) // 2
            Tasks(batch, 1, cost, TASK_ELEMENTS).run(lambda index, *_: row.emit(index))
        return function.result


class _Row:
    """Writes the loops over one row."""

    def __init__(self, rotation: Rotation, data: Any, factors: Any, core: Any, outputs: list[Any]) -> None:
        self.spec = rotation.spec
        self.data, self.factors, self.core, self.outputs = data, factors, core, outputs
        self.lanes = min(rotation.isa.lanes, self.spec.inner)
        self.vectors = self.spec.inner // self.lanes
        #: Outer indices whose vectors are in registers with those of one inner row, and how many such groups there are.
        self.near = max(1, min(self.spec.outer, _HELD // self.vectors))
        self.far = self.spec.outer // self.near

    def at(self, outer: Expr, core: Expr, vector: Expr) -> Expr:
        """The place of a vector in the row."""
        return (outer * self.spec.core + core) * self.spec.inner + vector * self.lanes

    def emit(self, row: Expr) -> None:
        """The loops over the row, each of which reads what the one before it has written."""
        spec, lanes = self.spec, self.lanes
        scratch = tir.allocate((spec.features,), "float32")
        with tir.loop(self.far) as far, tir.loop(spec.core) as core:
            group = [(near, vector) for near in range(self.near) for vector in range(self.vectors)]
            places = [self.at(far * self.near + near, core, vector) for near, vector in group]
            scaled = [
                tir.load(self.data, [row, place], lanes) * tir.load(self.factors, [place], lanes)
                for place in places
            ]
            values = _butterflies([ir.hold(value, "float32", lanes) for value in scaled], lanes)
            for place, value in zip(places, values, strict=True):
                tir.store(scratch, _within(value, lanes), [place], lanes)
        if self.far > 1:
            self.between(scratch)
        with tir.loop(spec.outer) as outer, tir.loop(self.vectors) as vector:
            if self.core is None:
                place = self.at(outer, 0, vector)
                self.store(tir.load(scratch, [place], lanes), row, place)
            else:
                self.times_core(scratch, row, outer, vector)

    def between(self, scratch: Any) -> None:
        """Butterflies between groups of outer indices, in place; few networks have so many."""
        count = self.near * self.spec.core * self.spec.inner
        with tir.loop(count // self.lanes) as vector:
            step = 1
            while step < self.far:
                with tir.loop(self.far // (2 * step)) as block, tir.loop(step) as first:
                    low = (block * (2 * step) + first) * count + vector * self.lanes
                    one, other = (
                        ir.hold(tir.load(scratch, [place], self.lanes), "float32", self.lanes)
                        for place in (low, low + step * count)
                    )
                    tir.store(scratch, one + other, [low], self.lanes)
                    tir.store(scratch, one - other, [low + step * count], self.lanes)
                step *= 2

    def times_core(self, scratch: Any, row: Expr, outer: Expr, vector: Expr) -> None:
        """Sums over the core's rows, some of its columns at a time."""
        size, lanes = self.spec.core, self.lanes
        for begin in range(0, size, _SUMS):
            count = min(_SUMS, size - begin)
            sums = ir.Registers(count, "float32", lanes)
            for slot in range(count):
                sums[slot] = tir.constant(0.0, "float32", lanes)
            with tir.loop(size) as index:
                value = ir.hold(tir.load(scratch, [self.at(outer, index, vector)], lanes), "float32", lanes)
                for slot in range(count):
                    factor = tir.broadcast(tir.load(self.core, [index, begin + slot]), lanes)
                    sums[slot] = sums[slot] + value * factor
            for slot in range(count):
                self.store(sums[slot], row, self.at(outer, begin + slot, vector))

    def store(self, value: Expr, row: Expr, at: Expr) -> None:
        """The epilogue of a vector; integer 0 for what is no number."""
        finish_defined(value, self.spec.epilogue, self.outputs, [row, at], self.lanes)
