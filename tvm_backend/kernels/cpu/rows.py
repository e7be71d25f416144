"""Softmax, LayerNorm, RMSNorm and GELU on rows of float32, by vectors, each row read from the nearest cache.

Errors, which the tests hold against float64: softmax ``p (2**-20 + 2**-24 d)`` at a distance ``d`` from the largest number; LayerNorm, on
centred numbers, ``2**-20 ((1 + |y|) |scale| + |bias|)``; RMSNorm ``2**-20 |y|``; GELU, as ``x`` times the normal distribution, ``2**-20 max(1, |x|)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.tirx import PrimFunc

from tvm_backend.kernels import tir
from tvm_backend.kernels.arithmetic import apply_epilogue
from tvm_backend.kernels.cpu import functions, ir
from tvm_backend.kernels.cpu.epilogue import finish_defined, pieces
from tvm_backend.kernels.cpu.generator import CpuGenerator
from tvm_backend.kernels.cpu.tasks import TASK_ELEMENTS, Tasks
from tvm_backend.kernels.spec import RowsSpec
from tvm_backend.kernels.tir import Expr

__all__ = ["Rows", "reference"]

_COST = 4
"""What a number takes, where a number that is only moved takes one."""


def reference(spec: RowsSpec, data: NDArray[Any], *constants: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """What the kernel approximates, in float64."""
    x = data.astype(float)
    if spec.function == "softmax":
        powers = np.exp(x - x.max(axis=1, keepdims=True))
        value = powers / powers.sum(axis=1, keepdims=True)
    elif spec.function == "layer_norm":
        centred = x - x.mean(axis=1, keepdims=True)
        value = centred / np.sqrt((centred * centred).mean(axis=1, keepdims=True) + spec.epsilon)
        value = value * constants[0] + constants[1]
    elif spec.function == "rms_norm":
        value = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + spec.epsilon) * constants[0]
    elif spec.function == "gelu":
        value = x * 0.5 * np.vectorize(math.erfc)(-x / math.sqrt(2))
    else:
        value = x / (1 + np.exp(-2 * functions.TANH[0] * (x + functions.TANH[1] * x**3)))
    return apply_epilogue(value.astype(np.float32), spec.epilogue)


@dataclass(frozen=True)
class Rows(CpuGenerator[RowsSpec]):
    """Generator of the kernel for one :class:`RowsSpec`."""

    def build(self, name: str) -> PrimFunc:
        """The PrimFunc."""
        spec = self.spec
        batch = tir.batch_extent(spec.batch)
        with tir.Function(name) as function:
            data, *rest = function.buffers(self.arguments(batch))
            constants = [rest.pop(0) for _ in spec.constants]
            row = _Row(self, data, constants, rest)
            emit = {"softmax": row.softmax, "layer_norm": row.layer_norm, "rms_norm": row.rms_norm}.get(
                spec.function, row.each
            )
            Tasks(batch, 1, spec.features * _COST, TASK_ELEMENTS).run(lambda index, *_: emit(index))
        return function.result


class _Row:
    """Writes the loops over one row."""

    def __init__(self, rows: Rows, data: Any, constants: list[Any], outputs: list[Any]) -> None:
        self.spec, self.lanes = rows.spec, rows.isa.lanes
        self.data, self.constants, self.outputs = data, constants, outputs

    def vectors(self, body: Callable[[Expr, int], None]) -> None:
        """Emit ``body(start, lanes)`` for the whole row."""
        for begin, repeat, lanes in pieces(self.spec.features, self.lanes):
            with tir.loop(repeat) as index:
                body(begin + index * lanes, lanes)

    def folded(self, value: Callable[[Expr, int], Expr], join: str = "add") -> Expr:
        """The sum, or the largest, of ``value(start, lanes)`` over the row."""

        def one(at: Expr, lanes: int) -> list[Expr]:
            return [value(at, lanes)]

        return functions.folded(self.spec.features, self.lanes, one, [join])[0]

    def softmax(self, row: Expr) -> None:
        """Powers of the differences to the largest number, divided by their sum."""
        powers = tir.allocate((self.spec.features,), "float32")
        largest = self.folded(lambda at, lanes: tir.load(self.data, [row, at], lanes), "max")

        def power(at: Expr, lanes: int) -> Expr:
            difference = tir.load(self.data, [row, at], lanes) - tir.broadcast(largest, lanes)
            value = ir.hold(functions.exp(difference, lanes), "float32", lanes)
            tir.store(powers, value, [at], lanes)
            return value

        inverse = ir.hold(tir.float32(1) / self.folded(power), "float32", 1)
        self.vectors(
            lambda at, lanes: self.store(
                tir.load(powers, [at], lanes) * tir.broadcast(inverse, lanes), row, at, lanes
            )
        )

    def layer_norm(self, row: Expr) -> None:
        """Centred, divided by the standard deviation, scaled and shifted."""
        count = tir.float32(1 / self.spec.features)
        mean = ir.hold(
            self.folded(lambda at, lanes: tir.load(self.data, [row, at], lanes)) * count, "float32", 1
        )

        def centred(at: Expr, lanes: int) -> Expr:
            return ir.hold(
                tir.load(self.data, [row, at], lanes) - tir.broadcast(mean, lanes), "float32", lanes
            )

        def square(at: Expr, lanes: int) -> Expr:
            value = centred(at, lanes)
            return value * value

        variance = self.folded(square) * count + tir.float32(self.spec.epsilon)
        scale = ir.hold(tir.float32(1) / tir.sqrt(variance), "float32", 1)

        def out(at: Expr, lanes: int) -> None:
            gamma, beta = (tir.load(constant, [at], lanes) for constant in self.constants)
            self.store(centred(at, lanes) * tir.broadcast(scale, lanes) * gamma + beta, row, at, lanes)

        self.vectors(out)

    def rms_norm(self, row: Expr) -> None:
        """Divided by the root of the mean square, and scaled."""

        def square(at: Expr, lanes: int) -> Expr:
            value = ir.hold(tir.load(self.data, [row, at], lanes), "float32", lanes)
            return value * value

        mean = self.folded(square) * tir.float32(1 / self.spec.features)
        scale = ir.hold(tir.float32(1) / tir.sqrt(mean + tir.float32(self.spec.epsilon)), "float32", 1)

        def out(at: Expr, lanes: int) -> None:
            value = tir.load(self.data, [row, at], lanes) * tir.broadcast(scale, lanes)
            self.store(value * tir.load(self.constants[0], [at], lanes), row, at, lanes)

        self.vectors(out)

    def each(self, row: Expr) -> None:
        """A function of each number."""

        def out(at: Expr, lanes: int) -> None:
            x = ir.hold(tir.load(self.data, [row, at], lanes), "float32", lanes)
            zero, one = tir.constant(0.0, "float32", lanes), tir.constant(1.0, "float32", lanes)
            if self.spec.function == "gelu":
                tail = functions.normal_tail(tir.larger(x, zero - x), lanes)
                tail = ir.hold(tail, "float32", lanes)
                part = tir.select(x < zero, tail, one - tail)
            else:
                factor, cube = (tir.constant(value, "float32", lanes) for value in functions.TANH)
                inner = factor * (x + cube * (x * x * x))
                part = one / (one + functions.exp(tir.constant(-2.0, "float32", lanes) * inner, lanes))
            self.store(x * part, row, at, lanes)

        self.vectors(out)

    def store(self, value: Expr, row: Expr, at: Expr, lanes: int) -> None:
        """The epilogue of a vector; integer 0 for what is no number."""
        finish_defined(value, self.spec.epilogue, self.outputs, [row, at], lanes)
