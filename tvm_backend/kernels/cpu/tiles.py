"""AMX tiles: eight matrices of up to 16 rows of 64 bytes in the processor, and the instruction that multiplies two.

``TDPBUSD c, a, b`` adds to each int32 ``c[m][n]`` the products of ``a[m][4 k + i]`` and ``b[k][4 n + i]`` (Intel 64 and
IA-32 Architectures Software Developer's Manual, volume 2); ``TDPBSSD`` does so for signed `a`.  Up to 16 * 16 * 64
products take the unit 16 cycles, one for each row of `a`.

Two tiles of activations and two of weights feed four tiles of sums, so that each tile that is loaded is used twice::

    tiles       0..3  sums, [rows of activations][vectors of channels]
                4..5  activations, 16 pixels of 64 bytes
                6..7  weights, 16 groups of four inputs for 16 channels

A step of the inner loop is four loads of 16 lines of 64 bytes and four products.  At two lines a cycle the loads take 32
cycles and the products 64: the floor is the products', one tile in 16 cycles or 1024 multiply-adds a cycle, as long as
weights and activations come from the core's own caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from tvm_backend.kernels import tir
from tvm_backend.kernels.cpu import ir
from tvm_backend.kernels.tir import Expr

__all__ = ["DEPTH", "ROWS", "TileProduct"]

ROWS = 16
"""Most rows of a tile."""

DEPTH = 64
"""Most bytes of a row."""

_LINE = 64
"""Bytes of a vector of weights, or of 16 sums."""

_ACTIVATIONS, _WEIGHTS = 4, 6
"""The first of the two tiles that hold each."""


def _do(name: str, *arguments: Expr) -> None:
    """Emit one tile instruction."""
    T.evaluate(ir.call("void", f"llvm.x86.{name}", *arguments))


def _tile(number: int) -> Expr:
    return tirx.const(number, "int8")


def _bytes(value: Expr) -> Expr:
    return tirx.const(value, "int64") if isinstance(value, int) else tir.cast(value, "int64")


@dataclass(frozen=True)
class TileProduct:
    """Products of two tiles of activations with one or two tiles of weights at a time.

    Parameters
    ----------
    rows : int
        Rows of a tile of activations, 1 to 16.
    depth : int
        Bytes of such a row, a multiple of 4 up to 64.
    vectors : int
        Vectors of 16 channels that lie side by side in the packed weights.
    signed : bool
        Whether activations are int8; uint8 otherwise.  Weights are int8.
    """

    rows: int
    depth: int
    vectors: int
    signed: bool

    @property
    def step_bytes(self) -> int:
        """Bytes of the packed weights of one step, all vectors together."""
        return self.depth // 4 * self.vectors * _LINE

    @property
    def staged(self) -> int:
        """Elements of the int32 buffer that takes the sums, ``[2 * rows][vectors * 16]``."""
        return 2 * self.rows * self.vectors * 16

    def pairs(self) -> list[range]:
        """The vectors, as many as there are tiles for at a time."""
        return [range(first, min(first + 2, self.vectors)) for first in range(0, self.vectors, 2)]

    @contextmanager
    def configured(self) -> Iterator[None]:
        """Shape the tiles for the statements inside and release them behind; each thread needs its own."""
        content = [0] * 64
        content[0] = 1  # the palette: eight tiles of 1 KiB
        for tile in range(8):
            content[16 + 2 * tile] = self.depth if tile in (_ACTIVATIONS, _ACTIVATIONS + 1) else _LINE
            content[48 + tile] = self.depth // 4 if tile >= _WEIGHTS else self.rows
        configuration = tir.allocate((64,), "uint8")
        tir.store(configuration, tir.constant(0, "uint8", 64), [0], 64)
        for place, value in enumerate(content):
            if value:
                tir.store(configuration, tir.constant(value, "uint8"), [place])
        _do("ldtilecfg", ir.address(configuration, [0]))
        yield
        _do("tilerelease")

    def clear(self, vectors: range) -> None:
        """Set the sums of a pair of vectors to zero."""
        for tile in range(2):
            for i in range(len(vectors)):
                _do("tilezero", _tile(2 * tile + i))

    def step(
        self,
        vectors: range,
        activations: Sequence[tuple[Any, Sequence[Expr]]],
        pitch: Expr,
        panel: Any,
        start: Expr,
    ) -> None:
        """Add the products of one step.

        Parameters
        ----------
        vectors : range
            The pair of vectors.
        activations : two (buffer, indices)
            Where the first row of each tile begins.
        pitch : Expr
            Bytes between two rows of activations.
        panel : Buffer of int8
            The packed weights, ``[depth / 4][vectors][16][4]`` for each step.
        start : Expr
            Where those of this step begin.
        """
        for tile, (buffer, indices) in enumerate(activations):
            _do("tileloadd64", _tile(_ACTIVATIONS + tile), ir.address(buffer, indices), _bytes(pitch))
        for i, vector in enumerate(vectors):
            place = ir.address(panel, [start + vector * _LINE])
            _do("tileloadd64", _tile(_WEIGHTS + i), place, _bytes(self.vectors * _LINE))
        name = "tdpbssd" if self.signed else "tdpbusd"
        for i in range(len(vectors)):
            for tile in range(2):
                _do(name, _tile(2 * tile + i), _tile(_ACTIVATIONS + tile), _tile(_WEIGHTS + i))

    def store(self, vectors: range, staging: Any) -> None:
        """Write the sums of a pair of vectors to a buffer of :attr:`staged` int32."""
        width = self.vectors * 16
        for tile in range(2):
            for i, vector in enumerate(vectors):
                place = ir.address(staging, [tile * self.rows * width + vector * 16])
                _do("tilestored64", _tile(2 * tile + i), place, _bytes(4 * width))

    def sums(self, staging: Any, tile: int, row: Expr) -> list[Expr]:
        """The stored sums of one row of activations, a vector of 16 channels each."""
        start = (row + tile * self.rows) * (self.vectors * 16)
        return [
            ir.hold(tir.load(staging, [start + vector * 16], 16), "int32", 16)
            for vector in range(self.vectors)
        ]
