"""Products of matrices that are both computed at run time: queries with keys, attention with values.

A task is one pair of matrices, one head of attention.  Block by block it brings the columns of the second matrix into the order in which
the loops read them, as the compiler does with the weights of layers, and goes through the first one by register tiles.  With zero points ``a`` and
``b`` the sum is ``sum(x y) - a sum(y) - b sum(x - a)``; the sums over a column are taken on the way, those over a row for each tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
        right = right.swapaxes(-1, -2)
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
        return vectors, rows if self.spec.shared else min(rows, self.spec.rows)

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
            if self.spec.shared:
                run(self.blocks, partial(emitter.shared, batch), True if self.blocks == 1 else small)
            else:
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
        """Where the panel holds a step of a vector of columns."""
        return (step * self.vectors + vector) * self.unit

    def task(self, image: Expr) -> None:
        """One pair of matrices."""
        self.prepare(image)
        panel = tir.allocate((self.steps * self.vectors * self.unit,), self.dtype)
        full, rest = divmod(self.spec.rows, self.rows)
        with tir.loop(self.blocks) as block:
            self.pack(image, panel, block)
            with tir.loop(full) as band:
                self.band(image, panel, block, band * self.rows, self.rows)
            if rest:
                self.band(image, panel, block, full * self.rows, rest)

    def prepare(self, image: Expr) -> None:
        """What is done once for a pair."""

    def shared(self, batch: Expr, block: Expr) -> None:
        """A block of columns of one matrix for all rows there are."""
        panel = tir.allocate((self.steps * self.vectors * self.unit,), self.dtype)
        self.pack(0, panel, block)
        with tir.loop(batch // self.rows) as band:
            self.band(0, panel, block, band * self.rows, self.rows)
        with tir.loop(batch % self.rows) as rest:
            self.band(0, panel, block, batch - batch % self.rows + rest, 1)

    def where(self, image: Expr, row: Expr) -> list[Expr]:
        """Indices of a row of the first matrix, and of the result."""
        return [row] if self.spec.shared else [image, row]

    def existing(self, block: Expr, some: Callable[[int], None]) -> None:
        """Emit ``some(columns)`` for the columns that a block has; the last one may have fewer."""
        width = self.vectors * self.lanes
        in_last = self.spec.columns - (self.blocks - 1) * width
        if self.blocks == 1 or in_last == width:
            some(in_last)
            return
        with tir.choose(block == self.blocks - 1) as (last, full):
            with last:
                some(in_last)
            with full:
                some(width)

    def each(self, block: Expr, vector: Callable[[Expr, Expr, int], None]) -> None:
        """Emit ``vector(number, first column, columns)`` for the vectors of a block, and those of which there are no columns."""

        def some(count: int) -> None:
            first = block * (self.vectors * self.lanes)
            full, rest = divmod(count, self.lanes)
            with tir.loop(full) as number:
                vector(number, first + number * self.lanes, self.lanes)
            if rest:
                vector(full, first + full * self.lanes, rest)
            for empty in range(full + (rest > 0), self.vectors):
                vector(empty, 0, 0)

        self.existing(block, some)

    def at(self, image: Expr, step: Expr, column: Expr) -> list[Expr]:
        """Indices of the second matrix."""
        indices = [column, step] if self.spec.transposed else [step, column]
        return indices if self.spec.shared else [image, *indices]

    def pack(self, image: Expr, panel: Any, block: Expr) -> None:
        """Bring columns of the second matrix into order."""
        raise NotImplementedError

    def band(self, image: Expr, panel: Any, block: Expr, row: Expr, rows: int) -> None:
        """The columns of a block in some rows."""
        raise NotImplementedError

    def store(self, values: list[Expr], where: list[Expr], block: Expr) -> None:
        """The epilogue of a row of vectors; in the last block some columns may not exist."""
        lanes, width = self.lanes, self.vectors * self.lanes

        def some(count: int) -> None:
            whole, rest = divmod(count, lanes)
            if whole:
                finish_row(values[:whole], self.finish, None, self.outputs, [*where, block * width], self.isa)
            for begin, some_lanes in chunks(rest, lanes):
                at = block * width + (whole * lanes + begin)
                part = ir.part(values[whole], begin, some_lanes)
                finish(part, self.finish, None, self.outputs, [*where, at], some_lanes)

        self.existing(block, some)


class _Reals(_Emitter):
    """Products of float32."""

    dtype = "float32"

    @property
    def unit(self) -> int:  # type: ignore[override]
        """A vector of columns."""
        return self.lanes

    def pack(self, image: Expr, panel: Any, block: Expr) -> None:
        """Vectors of columns one behind the other."""
        lanes, transposed = self.lanes, self.spec.transposed

        def vector(number: Expr, first: Expr, count: int) -> None:
            with tir.loop(self.steps) as step:
                place = self.place(number, step)
                if count == lanes and not transposed:
                    value = tir.load(self.right, self.at(image, step, first), lanes)
                    tir.store(panel, value, [place], lanes)
                    return
                if count < lanes:
                    tir.store(panel, tir.constant(0, "float32", lanes), [place], lanes)
                if count:
                    with tir.loop(count) as lane:
                        value = tir.load(self.right, self.at(image, step, first + lane))
                        tir.store(panel, value, [place + lane])

        self.each(block, vector)

    def band(self, image: Expr, panel: Any, block: Expr, row: Expr, rows: int) -> None:
        """Sums in registers over all products."""
        lanes, vectors = self.lanes, self.vectors
        held = ir.Registers(rows * vectors, "float32", lanes)
        for slot in range(rows * vectors):
            held[slot] = tir.constant(0, "float32", lanes)
        with tir.loop(self.steps) as step:
            places = [self.place(v, step) for v in range(vectors)]
            right = [ir.hold(tir.load(panel, [place], lanes), "float32", lanes) for place in places]
            for r in range(rows):
                value = tir.broadcast(tir.load(self.left, [*self.where(image, row + r), step]), lanes)
                for v in range(vectors):
                    slot = r * vectors + v
                    if self.isa.fuses:
                        held[slot] = ir.fma(value, right[v], held[slot], lanes)
                    else:
                        held[slot] = held[slot] + value * right[v]
        for r in range(rows):
            self.store([held[r * vectors + v] for v in range(vectors)], self.where(image, row + r), block)


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
        self.shifts: Any = None

    @property
    def unit(self) -> int:  # type: ignore[override]
        """Bytes of a vector."""
        return self.isa.unit

    def bytes(self, image: Expr, step: Expr, column: Expr, lanes: int) -> Expr:
        """Neighbouring numbers of the second matrix in a row or, where it is transposed, of a column; signed."""
        value = tir.load(self.right, self.at(image, step, column), lanes)
        kind = self.spec.inputs[1]
        assert isinstance(kind, QParams)
        return ir.flip_sign(value, kind.dtype, lanes) if self.flips[1] else value

    def pack(self, image: Expr, panel: Any, block: Expr) -> None:
        """Groups of a column side by side, and what the zero point of the first matrix makes of each column."""
        lanes, group, unit = self.lanes, self.group, self.unit
        full, rest = divmod(self.spec.inner, group)
        self.terms = tir.allocate((self.vectors * lanes,), "int32")
        zero = self.kinds[0].zero_point

        def vector(number: Expr, first: Expr, count: int) -> None:
            total = ir.Registers(1, "int32", lanes)
            total[0] = tir.constant(0, "int32", lanes)

            def groups(step: Expr, present: int) -> None:
                place = self.place(number, step)
                if count == lanes and not self.spec.transposed:
                    wide = [self.bytes(image, step * group + g, first, lanes) for g in range(present)]
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
                        at, column = place + lane * group, first + lane
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

        self.each(block, vector)

    def band(self, image: Expr, panel: Any, block: Expr, row: Expr, rows: int) -> None:
        """Sums in registers over all products."""
        spec, lanes, vectors, group = self.spec, self.lanes, self.vectors, self.group
        source, first, at, flip = self.left, row, self.where(image, row)[:-1], self.flips[0]
        if spec.inner % group:
            source, first, at, flip = self.lengthened(image, row, rows), 0, [], False
        begin = [tir.load(self.terms, [v * lanes], lanes) for v in range(vectors)]
        held = Sums(self.isa, begin, rows)

        def products(step: Expr) -> None:
            right = [
                ir.hold(self.isa.weights(panel, [self.place(v, step)]), "int8", self.unit)
                for v in range(vectors)
            ]
            for r in range(rows):
                value = self.isa.activations(source, [*at, first + r, step * group], flip)
                for v in range(vectors):
                    held.add(r * vectors + v, value, right[v])

        held.loop(self.steps, products)
        factor = tir.constant(spec.factor, "float32", lanes)
        for r in range(rows):
            totals = [held[r * vectors + v] for v in range(vectors)]
            if self.kinds[1].zero_point:
                shift = ir.hold(self.shift(image, row + r), "int32", 1)
                totals = [total + tir.broadcast(shift, lanes) for total in totals]
            values = [tir.cast(total, "float32", lanes) * factor for total in totals]
            self.store(values, self.where(image, row + r), block)

    def prepare(self, image: Expr) -> None:
        """What the zero point of the second matrix makes of each row."""
        if self.kinds[1].zero_point:
            self.shifts = tir.allocate((self.spec.rows,), "int32")
            with tir.loop(self.spec.rows) as row:
                tir.store(self.shifts, self.summed(image, row), [row])

    def shift(self, image: Expr, row: Expr) -> Expr:
        """The same of one row."""
        return self.summed(image, row) if self.spec.shared else tir.load(self.shifts, [row])

    def summed(self, image: Expr, row: Expr) -> Expr:
        """``-b sum(x - a)`` over a row ``x``."""
        kind = self.spec.inputs[0]
        assert isinstance(kind, QParams)
        total = ir.Registers(1, "int32", 1)
        total[0] = tir.int32(-kind.zero_point * self.spec.inner)
        with tir.loop(self.spec.inner) as k:
            total[0] = total[0] + tir.cast(tir.load(self.left, [*self.where(image, row), k]), "int32")
        return total[0] * tir.int32(-self.kinds[1].zero_point)

    def lengthened(self, image: Expr, row: Expr, rows: int) -> Any:
        """A copy of some rows with zeros behind each, as the instructions take them."""
        kind, seen = self.spec.inputs[0], self.kinds[0]
        assert isinstance(kind, QParams)
        copy = tir.allocate((rows, self.steps * self.group), seen.dtype)
        for r in range(rows):
            with tir.loop(self.spec.inner) as k:
                value = tir.load(self.left, [*self.where(image, row + r), k])
                tir.store(copy, ir.flip_sign(value, kind.dtype) if self.flips[0] else value, [r, k])
            for k in range(self.spec.inner, self.steps * self.group):
                tir.store(copy, tir.constant(0, seen.dtype), [r, k])
        return copy
