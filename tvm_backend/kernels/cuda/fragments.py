"""A warp's part of a tile of sums, by tensor cores: int8 ``mma`` on two tiles of bytes in shared memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm_backend.kernels import tir
from tvm_backend.kernels.cuda import device
from tvm_backend.kernels.cuda.packing import CHUNK
from tvm_backend.kernels.cuda.tiles import PITCH, Tile
from tvm_backend.kernels.tir import Expr

__all__ = ["Fragments"]


class Fragments:
    """The sums that a thread holds, and how they grow.

    Parameters
    ----------
    tile : Tile
        The block's.
    thread : Expr
        Number of the thread in its group.
    left, right : Buffer
        The tiles in shared memory, rows of 64 bytes, :data:`~tvm_backend.kernels.cuda.tiles.PITCH` words apart.
    signed : bool
        Whether the bytes of `left` are; those of `right` always are.
    totals : tuple of (bool, bool), optional
        Whether the bytes of each row of `left`, and of each row of `right`, are summed as well.
    """

    def __init__(
        self,
        tile: Tile,
        thread: Expr,
        left: Any,
        right: Any,
        signed: bool,
        totals: tuple[bool, bool] = (False, False),
    ) -> None:
        self.left, self.right = left, right
        self.across, self.down = tile.fragments
        self.name = "cat_mma_s8" if signed else "cat_mma_u8"
        along_rows, along_columns = tile.warps
        warp, lane = thread // 32, thread % 32
        self.row = warp // along_columns * (tile.rows // along_rows)
        self.column = warp % along_columns * (tile.columns // along_columns)
        self.group, self.member = lane // 4, lane % 4
        self.sums = self._zeros(4 * self.across * self.down)
        self.rows = self._zeros(4 * self.across) if totals[0] else None
        self.columns = self._zeros(4 * self.down) if totals[1] else None
        self.ones = device.local(4, "int32")
        if any(totals):
            for i in range(4):
                tir.store(self.ones, tir.int32(0x01010101), [i])

    @staticmethod
    def _zeros(count: int) -> Any:
        made = device.local(count, "int32")
        for i in range(count):
            tir.store(made, tir.int32(0), [i])
        return made

    def multiply(self, left_begin: Expr = 0, right_begin: Expr = 0) -> None:
        """Add the products of the tiles that begin at these words: fragments of 16 by 8 sums, 32 products at a time."""
        a, b = device.local(4 * self.across, "int32"), device.local(2, "int32")
        for step in range(CHUNK // 32):
            word = step * 8 + self.member
            for m in range(self.across):
                for i in range(4):
                    place = (self.row + m * 16 + self.group + i % 2 * 8) * PITCH + word + i // 2 * 4
                    tir.store(a, self.left[left_begin + place], [4 * m + i])
                if self.rows is not None:
                    device.emit(self.name, (self.rows, 4 * m), (a, 4 * m), (self.ones, 0))
            for n in range(self.down):
                for i in range(2):
                    place = (self.column + n * 8 + self.group) * PITCH + word + i * 4
                    tir.store(b, self.right[right_begin + place], [i])
                if self.columns is not None:
                    device.emit(self.name, (self.columns, 4 * n), (self.ones, 0), (b, 0))
                for m in range(self.across):
                    device.emit(self.name, (self.sums, (m * self.down + n) * 4), (a, 4 * m), (b, 0))

    def each_row(self, some: Callable[[Expr, Callable[[], Any]], None]) -> None:
        """Emit ``some(row, sums)`` for the thread's rows.

        ``sums()`` gives for each pair of neighbouring columns its number, the first column, which is even, and its sums; a sum comes with
        those of its row and its column.
        """
        for m in range(self.across):
            for half in range(2):

                def sums(m: int = m, half: int = half) -> Any:
                    for n in range(self.down):
                        both = []
                        for i in range(2):
                            own = self.sums[(m * self.down + n) * 4 + 2 * half + i]
                            of_row = None if self.rows is None else self.rows[4 * m + 2 * half]
                            of_column = None if self.columns is None else self.columns[4 * n + i]
                            both.append((own, of_row, of_column))
                        yield n, self.first_column(n), both

                some(self.row + m * 16 + self.group + half * 8, sums)

    def first_column(self, n: int) -> Expr:
        """The first column of the thread's n-th pair."""
        return self.column + n * 8 + self.member * 2
