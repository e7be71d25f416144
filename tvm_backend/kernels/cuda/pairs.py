"""Products of matrices that are both computed at run time, queries with keys, attention with values, by tensor cores.

A block of threads computes a tile of the sums of one pair, as those of layers do (:mod:`tvm_backend.kernels.cuda.product`).  With zero
points ``a`` and ``b`` the result is ``sum(x y) - a sum(y) - b sum(x) + a b inner``; tensor cores take the sums over rows and columns too, as
products with ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from tvm.tirx import PrimFunc

from tvm_backend.kernels import tir
from tvm_backend.kernels.cuda import device
from tvm_backend.kernels.cuda.epilogue import finish, finish_pair
from tvm_backend.kernels.cuda.fragments import Fragments
from tvm_backend.kernels.cuda.generator import CudaGenerator
from tvm_backend.kernels.cuda.isa import Cuda, TensorCores
from tvm_backend.kernels.cuda.packing import CHUNK
from tvm_backend.kernels.cuda.tiles import PITCH, Tile, pair_tile
from tvm_backend.kernels.kernel import Machine
from tvm_backend.kernels.spec import ProductSpec, QParams
from tvm_backend.kernels.tir import Expr

__all__ = ["PairProduct"]

_SIGNS = -0x7F7F7F80
"""The highest bit of each byte of a word."""


@dataclass(frozen=True)
class PairProduct(CudaGenerator[ProductSpec]):
    """Generator of the kernel for one :class:`ProductSpec` of integers."""

    @classmethod
    def takes(cls, spec: ProductSpec, isa: Machine) -> bool:
        """Whether the device has such products, of pairs of integers."""
        return isinstance(isa, TensorCores) and spec.integers and not spec.shared

    @classmethod
    def make(cls, spec: ProductSpec, isa: Cuda) -> Self:
        """The generator on what the device multiplies with."""
        return cls(spec, isa)

    @property
    def tile(self) -> Tile:
        """The block's tile."""
        return pair_tile(self.spec.batch, self.spec.rows, self.spec.columns)

    @property
    def kinds(self) -> tuple[QParams, QParams]:
        """The integers as tensor cores see them; those of the second matrix are signed."""
        left, right = self.spec.inputs
        assert isinstance(left, QParams)
        assert isinstance(right, QParams)
        return left, right if right.signed else right.flipped

    def build(self, name: str) -> PrimFunc:
        """The PrimFunc."""
        spec, tile = self.spec, self.tile
        batch = tir.batch_extent(spec.batch)
        with tir.Function(name, private=True) as function:
            left, right, *outputs = function.buffers(self.arguments(batch))
            blocks = [batch, -(-spec.rows // tile.rows), -(-spec.columns // tile.columns)]
            with device.threads(blocks, tile.threads) as (block, thread):
                _Emitter(self, left, right, outputs, block, thread).emit()
        return function.result


class _Emitter:
    """Writes the body of one kernel."""

    def __init__(
        self,
        product: PairProduct,
        left: Any,
        right: Any,
        outputs: list[Any],
        block: list[Expr],
        thread: Expr,
    ) -> None:
        self.spec, self.tile, self.kinds, self.outputs = product.spec, product.tile, product.kinds, outputs
        spec, tile = self.spec, self.tile
        self.image = block[0]
        self.row, self.column = (
            tir.cast(block[1], "int32") * tile.rows,
            tir.cast(block[2], "int32") * tile.columns,
        )
        flip = self.kinds[1] is not spec.inputs[1]
        place = self.image, thread, tile.threads
        self.loaders: list[_Along | _Across] = [
            _Along(left, spec.rows, spec.inner, self.row, tile.rows, False, *place)
        ]
        if spec.transposed:
            self.loaders.append(
                _Along(right, spec.columns, spec.inner, self.column, tile.columns, flip, *place)
            )
        else:
            self.loaders.append(
                _Across(right, spec.columns, spec.inner, self.column, tile.columns, flip, *place)
            )
        zeros = self.kinds[1].zero_point != 0, self.kinds[0].zero_point != 0
        targets = [loader.target for loader in self.loaders]
        self.fragments = Fragments(tile, thread, targets[0], targets[1], self.kinds[0].signed, zeros)

    def emit(self) -> None:
        """The loop over chunks, the next on its way while one is multiplied, then the epilogue."""
        chunks = -(-self.spec.inner // CHUNK)

        def each(some: Callable[[Any], None]) -> None:
            for loader in self.loaders:
                some(loader)

        each(lambda loader: loader.fetch(0))
        with tir.loop(chunks) as chunk:
            if chunks > 1:
                device.barrier()
            each(lambda loader: loader.deposit())
            device.barrier()
            if chunks > 1:
                with tir.when(chunk + 1 < chunks):
                    each(lambda loader: loader.fetch(chunk + 1))
            self.fragments.multiply()
        self.fragments.each_row(self._store)

    def _store(self, row: Expr, sums: Callable[[], Any]) -> None:
        spec, image = self.spec, tir.cast(self.image, "int64")
        row = self.row + row
        with tir.when(True if spec.rows % self.tile.rows == 0 else row < spec.rows):
            for _, column, both in sums():
                column = self.column + column
                values = [self._value(*each) for each in both]
                if spec.columns % 2 == 0:
                    with self._exists(column):
                        finish_pair(values, spec.epilogue, None, self.outputs, [image, row, column])
                    continue
                for i, value in enumerate(values):
                    with self._exists(column + i):
                        finish(value, spec.epilogue, None, self.outputs, [image, row, column + i])

    def _exists(self, column: Expr) -> Any:
        return tir.when(True if self.spec.columns % self.tile.columns == 0 else column < self.spec.columns)

    def _value(self, total: Expr, of_row: Expr, of_column: Expr) -> Expr:
        """A sum without its zero points, times the factor."""
        left, right = self.kinds
        if of_row is not None:
            total = total - of_row * tir.int32(right.zero_point)
        if of_column is not None:
            total = total - of_column * tir.int32(left.zero_point)
        total = total + tir.int32(left.zero_point * right.zero_point * self.spec.inner)
        return device.times(tir.cast(total, "float32"), tir.float32(self.spec.factor))


class _Loader:
    """Brings a piece of a matrix into shared memory, the long axis in words of four bytes."""

    pieces: int
    words: int

    def __init__(
        self,
        source: Any,
        count: int,
        inner: int,
        first: Expr,
        held: int,
        flip: bool,
        image: Expr,
        thread: Expr,
        threads: int,
    ) -> None:
        self.source, self.count, self.inner, self.first, self.flip = source, count, inner, first, flip
        self.image, self.thread, self.threads, self.tile = image, thread, threads, held
        self.target = device.shared(held * PITCH, "int32")
        #: What becomes 0 where the sign is turned.
        self.nothing = tir.int32(_SIGNS if flip else 0)

    def flat(self, unit: int) -> tuple[Any, Expr]:
        """The matrices as words, and where this one begins in units of so many bytes; one behind the other."""
        whole = device.words(self.source, self.source.shape[0] * (self.count * self.inner // 4))
        return whole, tir.cast(self.image, "int32") * (self.count * self.inner // unit)

    def signed(self, word: Expr) -> Expr:
        """The word with the highest bits turned where that is needed."""
        return word ^ tir.int32(_SIGNS) if self.flip else word

    def gathered(self, indices: Callable[[int], list[Expr]], exists: Callable[[int], Expr]) -> Expr:
        """A word of four single bytes."""
        total: Expr = None
        for byte in range(4):
            value = tir.cast(tir.load(self.source, indices(byte)), "uint8")
            known = exists(byte)
            if known is not True:
                value = tir.if_else(known, value, tir.constant(0x80 if self.flip else 0, "uint8"))
            value = tir.cast(value, "uint32") << tir.constant(8 * byte, "uint32")
            total = value if total is None else total | value
        return tir.reinterpret("int32", total)


class _Along(_Loader):
    """A matrix (count, inner), whose rows are read as they lie."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.unit = 16 if self.inner % 16 == 0 else 4 if self.inner % 4 == 0 else 1
        self.words = 4 if self.unit == 16 else 1
        self.per_row = CHUNK // 4 // self.words
        self.pieces = self.tile * self.per_row // self.threads
        self.registers = device.local(self.pieces * self.words, "int32")

    def _place(self, i: int) -> tuple[Expr, Expr]:
        """Row and word of the thread's i-th piece."""
        number = self.thread + i * self.threads
        return number // self.per_row, number % self.per_row * self.words

    def fetch(self, chunk: Expr) -> None:
        """From memory to registers; behind the last row that one again, which is not stored."""
        for i in range(self.pieces):
            row, word = self._place(i)
            row, k = tir.smaller(self.first + row, self.count - 1), chunk * CHUNK + word * 4
            inside = True if self.inner % CHUNK == 0 else k < self.inner
            slot = i * self.words
            if self.unit == 1:
                image, inner = tir.cast(self.image, "int64"), self.inner
                whole = inner % CHUNK == 0

                def at(byte: int, row: Expr = row, k: Expr = k, image: Expr = image) -> list[Expr]:
                    return [image, row, tir.smaller(k + byte, self.inner - 1)]

                def exists(byte: int, k: Expr = k, whole: bool = whole) -> Expr:
                    return True if whole else k + byte < self.inner

                tir.store(self.registers, self.gathered(at, exists), [slot])
                continue
            source, begin = self.flat(self.unit)
            place = (begin + row * (self.inner // self.unit) + k // self.unit) * self.words

            def load(source: Any = source, place: Expr = place, slot: int = slot) -> None:
                tir.store(self.registers, tir.load(source, [place], self.words), [slot], self.words)

            def pad(slot: int = slot) -> None:
                for word in range(self.words):
                    tir.store(self.registers, self.nothing, [slot + word])

            tir.branch(inside, load, pad)

    def deposit(self) -> None:
        """From registers to shared memory."""
        for i in range(self.pieces):
            row, word = self._place(i)
            if self.flip:
                for part in range(self.words):
                    value = self.signed(self.registers[i * self.words + part])
                    tir.store(self.target, value, [row * PITCH + word + part])
            else:
                value = tir.load(self.registers, [i * self.words], self.words)
                tir.store(self.target, value, [row * PITCH + word], self.words)


class _Across(_Loader):
    """A matrix (inner, count), four rows of which are interleaved for each word."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.pieces = self.tile // 4 * (CHUNK // 4) // self.threads
        self.registers = device.local(4 * self.pieces, "int32")

    def _place(self, i: int) -> tuple[Expr, Expr]:
        """Word along the long axis, and first of four columns, of the thread's i-th piece."""
        number = self.thread + i * self.threads
        return number % (CHUNK // 4), number // (CHUNK // 4) * 4

    def fetch(self, chunk: Expr) -> None:
        """A word of four columns from each of four rows."""
        for i in range(self.pieces):
            word, column = self._place(i)
            column = self.first + column
            for j in range(4):
                k = chunk * CHUNK + word * 4 + j
                inside = True if self.inner % CHUNK == 0 else k < self.inner
                row = k if inside is True else tir.smaller(k, self.inner - 1)
                if self.count % 4 == 0:
                    source, begin = self.flat(4)
                    group = tir.smaller(column, self.count - 4) // 4
                    value = tir.load(source, [begin + row * (self.count // 4) + group])
                else:

                    def at(byte: int, row: Expr = row, column: Expr = column) -> list[Expr]:
                        image = tir.cast(self.image, "int64")
                        return [image, row, tir.smaller(column + byte, self.count - 1)]

                    value = self.gathered(at, lambda _: True)
                if inside is not True:
                    value = tir.if_else(inside, value, self.nothing)
                tir.store(self.registers, value, [4 * i + j])

    def deposit(self) -> None:
        """Bytes of four rows to one word for each column."""
        for i in range(self.pieces):
            word, column = self._place(i)
            for c in range(4):
                total: Expr = None
                for j in range(4):
                    value = tir.reinterpret("uint32", self.registers[4 * i + j])
                    value = (value >> tir.constant(8 * c, "uint32")) & tir.constant(0xFF, "uint32")
                    value = value << tir.constant(8 * j, "uint32")
                    total = value if total is None else total | value
                packed = self.signed(tir.reinterpret("int32", total))
                tir.store(self.target, packed, [(column + c) * PITCH + word])
