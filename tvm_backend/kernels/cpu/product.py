"""Products of matrices that are both computed at run time: queries with keys, attention with values.

A task is one pair of matrices, one head of attention.  It brings the second matrix into the order in which the loops read it, as the
compiler does with the weights of layers, and goes through the first one by register tiles.  With zero points ``a`` and
``b`` the sum is ``sum(x y) - a sum(y) - b sum(x - a)``; the sums over a column are taken on the way, those over a row for each tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.tirx import PrimFunc

from tvm_backend.kernels import tir
from tvm_backend.kernels.arithmetic import apply_epilogue
from tvm_backend.kernels.cpu import ir
from tvm_backend.kernels.cpu.epilogue import chunks, finish, finish_row
from tvm_backend.kernels.cpu.generator import CpuGenerator
from tvm_backend.kernels.cpu.quantity import Finish
from tvm_backend.kernels.cpu.sums import Sums
from tvm_backend.kernels.cpu.tasks import run
from tvm_backend.kernels.spec import ProductSpec, QParams
from tvm_backend.kernels.tir import Expr

__all__ = ["Product", "reference"]

_TASK_MACS = 200_000
"""Work that is worth waking threads for."""


def reference(spec: ProductSpec, left: NDArray[Any], right: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """What the kernel computes, in numpy: integers to the bit, float32 up to the order of sums."""
    if spec.transposed:
        right = right.swapaxes(1, 2)
    if not spec.integers:
        return apply_epilogue((left.astype(float) @ right.astype(float)).astype(np.float32), spec.epilogue)
    zeros = [kind.zero_point for kind in spec.inputs if isinstance(kind, QParams)]
    # Products of bytes sum exactly in float64, whose matrix product is fast.
    total = (left.astype(float) - zeros[0]) @ (right.astype(float) - zeros[1])
    return apply_epilogue(total.astype(np.int32).astype(np.float32) * np.float32(spec.factor), spec.epilogue)


@dataclass(frozen=True)
class Product(CpuGenerator[ProductSpec]):
    """Generator of the kernel for one :class:`ProductSpec`."""

    @property
    def group(self) -> int:
        """Numbers of a row that an instruction multiplies at once."""
        return self.isa.group if self.spec.integers else 1

    @property
    def steps(self) -> int:
        """Groups of a row."""
        return -(-self.spec.inner // self.group)

    @property
    def tile(self) -> tuple[int, int]:
        """Vectors and rows of the register tile that wastes least."""
        needed = -(-self.spec.columns // self.isa.lanes)

        def cost(tile: tuple[int, int]) -> float:
            vectors, rows = tile
            return -(-needed // vectors) * vectors * (1 + 0.35 * (1 / rows + 1 / vectors))

        vectors, rows = min(self.isa.tiles, key=cost)
        return vectors, min(rows, self.spec.rows)

    @property
    def blocks(self) -> int:
        """Blocks of columns, the last one possibly not full."""
        return -(-self.spec.columns // (self.tile[0] * self.isa.lanes))

    @property
    def kinds(self) -> tuple[QParams, QParams]:
        """The integers as the instructions see them; those of the second matrix are signed."""
        left, right = self.spec.inputs
        assert isinstance(left, QParams)
        assert isinstance(right, QParams)
        flip = self.isa.takes not in ("", left.dtype)
        return left.flipped if flip else left, right if right.signed else right.flipped

    def build(self, name: str) -> PrimFunc:
        """The PrimFunc."""
        batch = tir.batch_extent(self.spec.batch)
        with tir.Function(name) as function:
            left, right, *outputs = function.buffers(self.arguments(batch))
            emitter = (_Integers if self.spec.integers else _Reals)(self, left, right, outputs)
            small = batch * self.spec.macs < _TASK_MACS
            run(batch, emitter.task, small if isinstance(small, bool) else tir.either(batch == 1, small))
        return function.result


class _Emitter:
    """Writes the loops of one kernel."""

    unit: int
    dtype: str

    def __init__(self, product: Product, left: Any, right: Any, outputs: list[Any]) -> None:
        self.product, self.spec, self.isa = product, product.spec, product.isa
        self.left, self.right, self.outputs = left, right, outputs
        self.lanes, (self.vectors, self.rows) = self.isa.lanes, product.tile
        self.steps, self.blocks = product.steps, product.blocks
        self.finish = Finish.of(self.spec.epilogue)

    def place(self, vector: Expr, step: Expr) -> Expr:
        """Where the panel holds a step of one of all vectors of columns."""
        block, within = vector // self.vectors, vector % self.vectors
        return ((block * self.steps + step) * self.vectors + within) * self.unit

    def task(self, image: Expr) -> None:
        """One pair of matrices."""
        panel = tir.allocate((self.blocks * self.steps * self.vectors * self.unit,), self.dtype)
        self.pack(image, panel)
        full, rest = divmod(self.spec.rows, self.rows)
        with tir.loop(full) as index:
            self.band(image, panel, index * self.rows, self.rows)
        if rest:
            self.band(image, panel, full * self.rows, rest)

    def columns(self, vector: Callable[[Expr, int], None]) -> None:
        """Emit ``vector(number, columns)`` for all vectors of columns, and those of which there are none."""
        full, rest = divmod(self.spec.columns, self.lanes)
        with tir.loop(full) as number:
            vector(number, self.lanes)
        if rest:
            vector(full, rest)
        for empty in range(full + (rest > 0), self.blocks * self.vectors):
            vector(empty, 0)

    def pack(self, image: Expr, panel: Any) -> None:
        """Bring the second matrix into order."""
        raise NotImplementedError

    def band(self, image: Expr, panel: Any, row: Expr, rows: int) -> None:
        """All columns of some rows."""
        raise NotImplementedError

    def store(self, values: list[Expr], where: list[Expr], block: Expr) -> None:
        """The epilogue of a row of vectors; in the last block some columns may not exist."""
        lanes, width = self.lanes, self.vectors * self.lanes
        in_last = self.spec.columns - (self.blocks - 1) * width

        def some(count: int) -> None:
            whole, rest = divmod(count, lanes)
            if whole:
                finish_row(values[:whole], self.finish, None, self.outputs, [*where, block * width], self.isa)
            for begin, some_lanes in chunks(rest, lanes):
                at = block * width + (whole * lanes + begin)
                part = ir.part(values[whole], begin, some_lanes)
                finish(part, self.finish, None, self.outputs, [*where, at], some_lanes)

        if self.blocks == 1 or in_last == width:
            some(in_last)
            return
        with tir.choose(block == self.blocks - 1) as (last, full):
            with last:
                some(in_last)
            with full:
                some(width)


class _Reals(_Emitter):
    """Products of float32."""

    dtype = "float32"

    @property
    def unit(self) -> int:  # type: ignore[override]
        """A vector of columns."""
        return self.lanes

    def pack(self, image: Expr, panel: Any) -> None:
        """Vectors of columns one behind the other."""
        lanes, transposed = self.lanes, self.spec.transposed

        def vector(number: Expr, count: int) -> None:
            with tir.loop(self.steps) as step:
                place = self.place(number, step)
                if count == lanes and not transposed:
                    value = tir.load(self.right, [image, step, number * lanes], lanes)
                    tir.store(panel, value, [place], lanes)
                    return
                if count < lanes:
                    tir.store(panel, tir.constant(0, "float32", lanes), [place], lanes)
                if count:
                    with tir.loop(count) as lane:
                        column = number * lanes + lane
                        indices = [image, column, step] if transposed else [image, step, column]
                        tir.store(panel, tir.load(self.right, indices), [place + lane])

        self.columns(vector)

    def band(self, image: Expr, panel: Any, row: Expr, rows: int) -> None:
        """Sums in registers over all products."""
        lanes, vectors = self.lanes, self.vectors
        with tir.loop(self.blocks) as block:
            held = ir.Registers(rows * vectors, "float32", lanes)
            for slot in range(rows * vectors):
                held[slot] = tir.constant(0, "float32", lanes)
            with tir.loop(self.steps) as step:
                place = self.place(block * vectors, step)
                right = [
                    ir.hold(tir.load(panel, [place + v * lanes], lanes), "float32", lanes)
                    for v in range(vectors)
                ]
                for r in range(rows):
                    value = tir.broadcast(tir.load(self.left, [image, row + r, step]), lanes)
                    for v in range(vectors):
                        slot = r * vectors + v
                        if self.isa.fuses:
                            held[slot] = ir.fma(value, right[v], held[slot], lanes)
                        else:
                            held[slot] = held[slot] + value * right[v]
            for r in range(rows):
                self.store([held[r * vectors + v] for v in range(vectors)], [image, row + r], block)


class _Integers(_Emitter):
    """Exact products of bytes."""

    dtype = "int8"

    def __init__(self, product: Product, left: Any, right: Any, outputs: list[Any]) -> None:
        super().__init__(product, left, right, outputs)
        self.kinds, self.group = product.kinds, product.group
        self.flips = [
            seen.dtype != kind.dtype
            for seen, kind in zip(self.kinds, self.spec.inputs, strict=True)
            if isinstance(kind, QParams)
        ]
        self.terms: Any = None

    @property
    def unit(self) -> int:  # type: ignore[override]
        """Bytes of a vector."""
        return self.isa.unit

    def bytes(self, image: Expr, step: Expr, column: Expr, lanes: int) -> Expr:
        """Neighbouring numbers of the second matrix in a row or, where it is transposed, of a column; signed."""
        indices = [image, column, step] if self.spec.transposed else [image, step, column]
        value = tir.load(self.right, indices, lanes)
        kind = self.spec.inputs[1]
        assert isinstance(kind, QParams)
        return ir.flip_sign(value, kind.dtype, lanes) if self.flips[1] else value

    def pack(self, image: Expr, panel: Any) -> None:
        """Groups of a column side by side, and what the zero point of the first matrix makes of each column."""
        lanes, group, unit = self.lanes, self.group, self.unit
        full, rest = divmod(self.spec.inner, group)
        self.terms = tir.allocate((self.blocks * self.vectors * lanes,), "int32")
        zero = self.kinds[0].zero_point

        def vector(number: Expr, count: int) -> None:
            total = ir.Registers(1, "int32", lanes)
            total[0] = tir.constant(0, "int32", lanes)

            def groups(step: Expr, present: int) -> None:
                place = self.place(number, step)
                if count == lanes and not self.spec.transposed:
                    wide = [
                        self.bytes(image, step * group + g, number * lanes, lanes) for g in range(present)
                    ]
                    wide = [ir.hold(value, "int8", lanes) for value in wide]
                    for value in wide if zero else ():
                        total[0] = total[0] + tir.cast(value, "int32", lanes)
                    wide += [tir.constant(0, "int8", lanes)] * (group - present)
                    order = [lane + lanes * g for lane in range(lanes) for g in range(group)]
                    tir.store(panel, tir.shuffle(wide, order) if group > 1 else wide[0], [place], unit)
                    return
                if count < lanes or present < group:
                    tir.store(panel, tir.constant(0, "int8", unit), [place], unit)
                if count:
                    with tir.loop(count) as lane:
                        at, column = place + lane * group, number * lanes + lane
                        if self.spec.transposed and present == group:
                            value = self.bytes(image, step * group, column, group)
                            tir.store(panel, value, [at], group)
                        else:
                            for g in range(present):
                                tir.store(panel, self.bytes(image, step * group + g, column, 1), [at + g])
                if zero:  # what has just been written, by vectors
                    packed = tir.load(panel, [place], unit)
                    for g in range(group):
                        part = tir.shuffle([packed], range(g, unit, group)) if group > 1 else packed
                        total[0] = total[0] + tir.cast(part, "int32", lanes)

            with tir.loop(full) as step:
                groups(step, group)
            if rest:
                groups(full, rest)
            tir.store(self.terms, total[0] * tir.constant(-zero, "int32", lanes), [number * lanes], lanes)

        self.columns(vector)

    def band(self, image: Expr, panel: Any, row: Expr, rows: int) -> None:
        """Sums in registers over all products."""
        spec, lanes, vectors, group = self.spec, self.lanes, self.vectors, self.group
        source, first, at, flip = self.left, row, [image], self.flips[0]
        if spec.inner % group:
            source, first, at, flip = self.lengthened(image, row, rows), 0, [], False
        shifts = ir.Registers(rows, "int32", 1)
        if zero := self.kinds[1].zero_point:
            kind = spec.inputs[0]
            assert isinstance(kind, QParams)
            for r in range(rows):
                shifts[r] = tir.int32(zero * kind.zero_point * spec.inner)
                with tir.loop(spec.inner) as k:
                    value = tir.cast(tir.load(self.left, [image, row + r, k]), "int32")
                    shifts[r] = shifts[r] - value * tir.int32(zero)
        with tir.loop(self.blocks) as block:
            begin = [tir.load(self.terms, [(block * vectors + v) * lanes], lanes) for v in range(vectors)]
            held = Sums(self.isa, begin, rows)

            def products(step: Expr) -> None:
                place = self.place(block * vectors, step)
                right = [
                    ir.hold(self.isa.weights(panel, [place + v * self.unit]), "int8", self.unit)
                    for v in range(vectors)
                ]
                for r in range(rows):
                    value = self.isa.activations(source, [*at, first + r, step * group], flip)
                    for v in range(vectors):
                        held.add(r * vectors + v, value, right[v])

            held.loop(self.steps, products)
            for r in range(rows):
                totals = [held[r * vectors + v] for v in range(vectors)]
                if zero:
                    totals = [total + tir.broadcast(shifts[r], lanes) for total in totals]
                factor = tir.constant(spec.factor, "float32", lanes)
                values = [tir.cast(total, "float32", lanes) * factor for total in totals]
                self.store(values, [image, row + r], block)

    def lengthened(self, image: Expr, row: Expr, rows: int) -> Any:
        """A copy of some rows with zeros behind each, as the instructions take them."""
        kind, seen = self.spec.inputs[0], self.kinds[0]
        assert isinstance(kind, QParams)
        copy = tir.allocate((rows, self.steps * self.group), seen.dtype)
        for r in range(rows):
            with tir.loop(self.spec.inner) as k:
                value = tir.load(self.left, [image, row + r, k])
                tir.store(copy, ir.flip_sign(value, kind.dtype) if self.flips[0] else value, [r, k])
            for k in range(self.spec.inner, self.steps * self.group):
                tir.store(copy, tir.constant(0, seen.dtype), [r, k])
        return copy
