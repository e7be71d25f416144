"""Writing vector code for a CPU into TVM's IR builder: chunks with exact tails, blocked sums, first minima.

Accumulators are buffers of their own, each read and written as a whole: LLVM turns those into registers.  They are of
scope "global", because TVM puts small constant ones of that scope on the stack and asks its workspace pool for those
of scope "local", which then stay in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm_backend.kernels import tir

__all__ = ["Vectors", "ceil_to"]

_Index = Callable[[Any], list[Any]]
_Value = Callable[[Any], Any]
_Term = Callable[[int, Any, Any, Any], Any]
_Store = Callable[[int, Any, Any], None]


def ceil_to(value: int, unit: int) -> int:
    """The smallest multiple of `unit` that is at least `value`."""
    return -(-value // unit) * unit


def _own(lane: Any) -> list[Any]:
    return [lane]


class Vectors:
    """Emits statements for vectors of a given number of float32 lanes.

    Parameters
    ----------
    lanes : int
        A power of two.
    accumulators : int
        How many vectors :meth:`sums` accumulates at once.
    """

    def __init__(self, lanes: int, accumulators: int) -> None:
        self.lanes, self.accumulators = lanes, accumulators

    def local(self, extent: int, dtype: str = "float32") -> Any:
        """A buffer that becomes a register."""
        return tir.allocate((extent,), dtype)

    def put(self, buffer: Any, width: int, value: _Value, index: _Index = _own) -> None:
        """``buffer[index(i)] = value(i)`` for i < width, as one vector."""
        if width == 1:
            tir.store(buffer, value(0), index(0))
            return
        with tir.vectorized(width) as lane:
            tir.store(buffer, value(lane), index(lane))

    def fill(self, buffer: Any, width: int, constant: float = 0.0) -> None:
        """Set the first `width` values of a one-dimensional buffer."""
        self.put(buffer, width, lambda _: tir.float32(constant))

    def chunks(self, extent: int, body: Callable[[Any, int], None], vectors: int = 1) -> None:
        """Call ``body(offset, width)`` in a loop over whole vectors, then for the powers of two in the tail.

        Parameters
        ----------
        extent : int
            What is covered, exactly.
        body : callable
            Emits the statements for `width` values from `offset` on.
        vectors : int
            Length of a chunk in vectors.
        """
        chunk = self.lanes * vectors
        if extent >= chunk:
            with tir.loop(extent // chunk) as step:
                body(step * chunk, chunk)
        offset, width = extent // chunk * chunk, chunk // 2
        while width:
            if extent % chunk & width:
                body(offset, width)
                offset += width
            width //= 2

    def sums(self, rows: int, count: int, extent: int, term: _Term, store: _Store) -> None:
        """``store(r, j, sum_c term(r, j, c))`` for all r < rows, j < count, c < extent.

        Parameters
        ----------
        rows, count, extent : int
            Extents of r, j and c.
        term : callable
            ``term(r, j, c, total)`` is the total with one more term; r is a number, j and c may be variables.
        store : callable
            Emits the statement that takes a finished sum.
        """
        wanted = max(1, self.accumulators // rows)
        columns = ceil_to(count, ceil_to(count, wanted) // wanted) // (ceil_to(count, wanted) // wanted)
        with tir.loop(count // columns) as block:
            self._sums_block(rows, block * columns, columns, extent, term, store)
        if count % columns:
            self._sums_block(rows, count // columns * columns, count % columns, extent, term, store)

    def _sums_block(
        self, rows: int, first: Any, columns: int, extent: int, term: _Term, store: _Store
    ) -> None:
        lanes = self.lanes
        while lanes > extent:
            lanes //= 2
        places = [(r, j) for r in range(rows) for j in range(columns)]
        sums = [self.local(lanes) for _ in places]

        def add(total: Any, r: int, j: int, offset: Any, fresh: int) -> None:
            def more(v: Any) -> Any:
                value = term(r, first + j, offset + v, total[v])
                return value if fresh == lanes else tir.select(v >= lanes - fresh, value, total[v])

            self.put(total, lanes, more)

        for total in sums:
            self.fill(total, lanes)
        with tir.loop(extent // lanes) as chunk:
            for total, (r, j) in zip(sums, places, strict=True):
                add(total, r, j, chunk * lanes, lanes)
        if extent % lanes:
            # The tail as the end of the last whole vector, whose other lanes have been added before.
            for total, (r, j) in zip(sums, places, strict=True):
                add(total, r, j, extent - lanes, extent % lanes)
        vectors, each = self._folded(sums, lanes)
        if columns > 1 and each % columns == 0:
            # A row's sums lie side by side.
            for i in range(0, rows * columns, columns):
                vector, lane, r = vectors[i // each], i % each, i // columns
                with tir.vectorized(columns) as j:
                    store(r, first + j, vector[lane + j])
            return
        for i, (r, j) in enumerate(places):
            store(r, first + j, vectors[i // each][i % each])

    def _folded(self, sums: list[Any], width: int) -> tuple[list[Any], int]:
        """The sums of the `width` lanes of each vector, in order, in as few vectors, and how many one of those holds.

        The halves of two vectors are added at once: three instructions for both, where each by itself takes two.
        """
        each = 1
        while width > 1:
            size, half = each * width, width // 2
            low = [lane for lane in range(size) if lane % width < half]
            pairs: list[tuple[Any, ...]] = [(total,) for total in sums]
            if len(sums) % 2 == 0:
                pairs = list(zip(sums[::2], sums[1::2], strict=True))
                low += [size + lane for lane in low]
                each *= 2
            sums = [self._halves_added(pair, size, low, half) for pair in pairs]
            width = half
        return sums, each

    def _halves_added(self, buffers: Sequence[Any], size: int, low: Sequence[int], half: int) -> Any:
        """Lanes `low` of the vectors taken together, plus those `half` a width behind them."""
        result = self.local(len(low))
        if len(low) == 1:
            tir.store(result, buffers[0][0] + buffers[0][half], [0])
            return result
        values = [buffer[tir.ramp(0, size)] for buffer in buffers]
        total = tir.shuffle(values, low) + tir.shuffle(values, [lane + half for lane in low])
        tir.store(result, total, [tir.ramp(0, len(low))])
        return result

    def total(self, partial: Any) -> Any:
        """The sum of a whole vector, as a value."""
        (vector,), _ = self._folded([partial], self.lanes)
        return vector[0]

    def smallest(self, value: _Value, extent: int, take: Callable[[Any, Any], None]) -> None:
        """``take(i, value(i))`` for the smallest of `extent` values, the lowest index among equals.

        Parameters
        ----------
        value : callable
            Read up to the next whole vector; what lies behind `extent` must be +inf.
        extent : int
            How many values count.
        take : callable
            Emits the statement that takes index (int32) and value.  The index is in range even for NaN.
        """
        lanes = self.lanes
        best, index = self.local(lanes), self.local(lanes, "int32")
        self.put(best, lanes, value)
        self.put(
            index,
            lanes,
            lambda v: tir.select(v < extent, v, tir.int32(0)),
        )
        chunks = ceil_to(extent, lanes) // lanes - 1
        with tir.loop(chunks) if chunks > 8 else tir.unrolled(chunks) as chunk:
            start = (chunk + 1) * lanes
            self.put(
                index,
                lanes,
                lambda v: tir.select(value(start + v) < best[v], start + v, index[v]),
            )
            self.put(best, lanes, lambda v: tir.smaller(best[v], value(start + v)))
        width = lanes // 2
        while width:
            self._fold_smallest(best, index, width)
            width //= 2
        take(index[0], best[0])

    def _fold_smallest(self, best: Any, index: Any, width: int) -> None:
        def pick(v: Any) -> Any:
            equal = tir.all_of(best[v + width] == best[v], index[v + width] < index[v])
            return tir.select(tir.either(best[v + width] < best[v], equal), index[v + width], index[v])

        self.put(index, width, pick)
        self.put(best, width, lambda v: tir.smaller(best[v], best[v + width]))
