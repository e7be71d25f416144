"""Softmax, LayerNorm, RMSNorm and GELU on rows of float32: a warp for each row, a block for each long one.

The errors stay within those that :mod:`tvm_backend.kernels.cpu.rows` states.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx import PrimFunc

from tvm_backend.kernels import tir
from tvm_backend.kernels.cpu.functions import TANH
from tvm_backend.kernels.cuda import device
from tvm_backend.kernels.cuda.epilogue import defined, quantized
from tvm_backend.kernels.cuda.generator import CudaGenerator
from tvm_backend.kernels.cuda.pointwise import Pointwise
from tvm_backend.kernels.kernel import Machine
from tvm_backend.kernels.spec import QParams, RowsSpec
from tvm_backend.kernels.tir import Expr

__all__ = ["CudaEach", "CudaRows"]

_THREADS = 128
_WARP = 32


def _store(
    spec: RowsSpec, value: Expr, held: Any, slot: int, outputs: list[Any], indices: list[Expr]
) -> None:
    """The epilogue of one number, which `held` keeps at `slot`; integer 0 for what is no number."""
    tir.store(held, value, [slot])
    for output, kind in zip(outputs, spec.epilogue.outputs, strict=True):
        known = defined(held[slot], kind) if isinstance(kind, QParams) else held[slot]
        tir.store(output, quantized(known, kind, spec.epilogue.clip), indices)


@dataclass(frozen=True)
class CudaEach(Pointwise[RowsSpec]):
    """Generator of a function of each number, in a thread of its own."""

    @classmethod
    def takes(cls, spec: RowsSpec, isa: Machine) -> bool:
        """Whether numbers of a row have nothing to do with each other."""
        return spec.function in ("gelu", "gelu_tanh")

    def emit(self, buffers: list[Any], image: Expr, indices: list[Expr]) -> None:
        """Compute and store one place."""
        spec, where = self.spec, [image, *indices]
        x, held = device.local(1), device.local(1)
        tir.store(x, tir.load(buffers[0], where), [0])
        if spec.function == "gelu":
            part = device.call("float32", "normcdff", x[0])
        else:
            factor, cube = (tir.float32(value) for value in TANH)
            inner = factor * (x[0] + cube * (x[0] * x[0] * x[0]))
            part = tir.float32(1) / (tir.float32(1) + tir.exp(tir.float32(-2) * inner))
        _store(spec, x[0] * part, held, 0, buffers[1:], where)


@dataclass(frozen=True)
class CudaRows(CudaGenerator[RowsSpec]):
    """Generator of a function of whole rows."""

    @property
    def shared_by(self) -> int:
        """Threads that share a row: so many that the registers of each hold its part."""
        features = self.spec.features
        return _WARP if features <= 1024 else _THREADS if features <= 8192 else 1024

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return max(_THREADS, self.shared_by)

    def build(self, name: str) -> PrimFunc:
        """The PrimFunc."""
        spec = self.spec
        batch = tir.batch_extent(spec.batch)
        per_block = self.threads // self.shared_by
        with tir.Function(name, private=True) as function:
            data, *rest = function.buffers(self.arguments(batch))
            constants = [rest.pop(0) for _ in spec.constants]
            blocks = (batch + per_block - 1) // per_block
            with device.threads([blocks], self.threads) as ((block,), thread):
                row = tir.cast(block, "int64") * per_block + thread // self.shared_by
                with tir.when(True if per_block == 1 else row < batch):
                    _Row(self, data, constants, rest, row, thread).emit()
        return function.result


class _Row:
    """Writes what one thread does for its row; it holds every so many-th number of it in registers."""

    def __init__(
        self,
        rows: CudaRows,
        data: Any,
        constants: list[Any],
        outputs: list[Any],
        row: Expr,
        thread: Expr,
    ) -> None:
        self.spec, self.row, self.thread = rows.spec, row, thread
        self.data, self.constants, self.outputs = data, constants, outputs
        self.shared_by = rows.shared_by
        self.first = thread % self.shared_by
        self.count = -(-self.spec.features // self.shared_by)
        self.held = device.local(self.count)
        self.warps = self.shared_by // _WARP
        self.between = device.shared(self.warps) if self.warps > 1 else None

    def each(self, some: Callable[[int, Expr], None]) -> None:
        """Emit ``some(slot, feature)`` for each of the thread's numbers that exist."""
        for slot in range(self.count):
            feature = self.first + slot * self.shared_by
            full = (slot + 1) * self.shared_by <= self.spec.features
            with tir.when(True if full else feature < self.spec.features):
                some(slot, feature)

    def folded(self, value: Callable[[int], Expr], join: str = "add") -> Expr:
        """The sum, or the largest, of ``value(slot)`` over the row; every thread has it."""
        total = device.local(1)

        def joined(one: Expr, other: Expr) -> Expr:
            return one + other if join == "add" else tir.larger(one, other)

        tir.store(total, tir.float32(0.0 if join == "add" else -math.inf), [0])
        self.each(lambda slot, _: tir.store(total, joined(total[0], value(slot)), [0]))
        distance = _WARP // 2
        while distance:
            tir.store(total, joined(total[0], device.exchanged(total[0], distance, "float32")), [0])
            distance //= 2
        if self.between is not None:
            device.barrier()  # what was there before has been read
            tir.store(self.between, total[0], [self.thread // _WARP])
            device.barrier()
            tir.store(total, self.between[0], [0])
            for warp in range(1, self.warps):
                tir.store(total, joined(total[0], self.between[warp]), [0])
        return total[0]

    def emit(self) -> None:
        """Read the row, compute, store."""
        self.each(lambda slot, at: tir.store(self.held, tir.load(self.data, [self.row, at]), [slot]))
        {"softmax": self.softmax, "layer_norm": self.layer_norm, "rms_norm": self.rms_norm}[
            self.spec.function
        ]()

    def change(self, value: Callable[[Expr], Expr]) -> None:
        """Put ``value(x)`` in the place of each number."""
        self.each(lambda slot, _: tir.store(self.held, value(self.held[slot]), [slot]))

    def out(self, value: Callable[[Expr, Expr], Expr]) -> None:
        """Store ``value(x, feature)`` of each number."""
        self.each(
            lambda slot, at: _store(
                self.spec, value(self.held[slot], at), self.held, slot, self.outputs, [self.row, at]
            )
        )

    def softmax(self) -> None:
        """Powers of the differences to the largest number, divided by their sum."""
        largest = self.folded(lambda slot: self.held[slot], "max")
        self.change(lambda x: tir.exp(x - largest))
        total = self.folded(lambda slot: self.held[slot])
        inverse = device.local(1)
        tir.store(inverse, tir.float32(1) / total, [0])
        self.out(lambda x, _: x * inverse[0])

    def layer_norm(self) -> None:
        """Centred, divided by the standard deviation, scaled and shifted."""
        mean = device.local(1)
        tir.store(mean, self.folded(lambda slot: self.held[slot]) / tir.float32(self.spec.features), [0])
        self.change(lambda x: x - mean[0])
        scale, (gamma, beta) = self.scale(), self.constants
        self.out(lambda x, at: x * scale * tir.load(gamma, [at]) + tir.load(beta, [at]))

    def rms_norm(self) -> None:
        """Divided by the root of the mean square, and scaled."""
        scale, (gamma,) = self.scale(), self.constants
        self.out(lambda x, at: x * scale * tir.load(gamma, [at]))

    def scale(self) -> Expr:
        """One over the root of the mean square."""
        square = self.folded(lambda slot: self.held[slot] * self.held[slot]) / tir.float32(self.spec.features)
        scale = device.local(1)
        tir.store(scale, tir.float32(1) / tir.sqrt(square + tir.float32(self.spec.epsilon)), [0])
        return scale[0]
