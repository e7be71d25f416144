"""Instruction sets: how a vector of sums takes up one group of products.

A kernel multiplies ``group`` consecutive activations of one pixel with the weights of ``lanes`` output channels, laid
out ``[lanes][group]``, and adds the products to ``lanes`` int32 sums.  An instruction set says how.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.target import Target, codegen

from tvm_backend.kernels import ir
from tvm_backend.kernels.ir import Expr

__all__ = ["Amx", "Avx2", "Avx512Vnni", "InstructionSet", "Portable", "select"]


@dataclass(frozen=True)
class InstructionSet:
    """Base class.

    Parameters
    ----------
    name : str
        Short name, used in kernel names and reports.
    lanes : int
        Output channels in one vector of int32 sums.
    group : int
        Consecutive activations multiplied at once.
    unsigned : bool
        Whether activations must be uint8; signed ones are then offset by 128.
    tiles : tuple of (int, int)
        Register tiles, each as (vectors, most pixels), best first.
    """

    name: str
    lanes: int
    group: int
    unsigned: bool
    tiles: tuple[tuple[int, int], ...]

    @property
    def unit(self) -> int:
        """Bytes of one weight vector."""
        return self.lanes * self.group

    @property
    def vector(self) -> InstructionSet:
        """The set of the kernels that work on vectors only."""
        return self

    def activations(self, buffer: Any, indices: Sequence[Expr], flip: bool) -> Expr:
        """`group` activations, in every lane; `flip` turns int8 into uint8 offset by 128."""
        raise NotImplementedError

    def weights(self, buffer: Any, indices: Sequence[Expr]) -> Expr:
        """One vector of int8 weights."""
        return ir.load(buffer, indices, self.unit)

    def dot(self, sums: Expr, activations: Expr, weights: Expr) -> Expr:
        """The sums with the products added."""
        raise NotImplementedError

    @property
    def narrows(self) -> bool:
        """Whether :meth:`narrow` is there."""
        return False

    def round_to_int(self, value: Expr) -> Expr:
        """float32 to int32, ties to even; the most negative integer for whatever does not fit."""
        raise NotImplementedError

    def narrow(self, values: Sequence[Expr], dtype: str, in_order: bool = True) -> Expr:
        """Up to four int32 vectors to bytes, with saturation.

        `in_order` puts the vectors one after the other; else each 128-bit lane holds what all vectors have there,
        which costs less.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Portable(InstructionSet):
    """Plain vector arithmetic that LLVM lowers for any target; a product of 8-bit values fits in 16 bits."""

    name: str = "portable"
    lanes: int = 8
    group: int = 1
    unsigned: bool = False
    tiles: tuple[tuple[int, int], ...] = ((2, 2), (1, 4))

    def activations(self, buffer: Any, indices: Sequence[Expr], flip: bool) -> Expr:
        assert not flip
        return ir.broadcast(ir.cast(ir.load(buffer, indices), "int16"), self.lanes)

    def dot(self, sums: Expr, activations: Expr, weights: Expr) -> Expr:
        product = activations * ir.cast(weights, "int16", self.lanes)
        return sums + ir.cast(product, "int32", self.lanes)


@dataclass(frozen=True)
class Avx512Vnni(InstructionSet):
    """``vpdpbusd`` on 512-bit registers: 64 products of uint8 and int8 an instruction."""

    name: str = "avx512_vnni"
    lanes: int = 16
    group: int = 4
    unsigned: bool = True
    tiles: tuple[tuple[int, int], ...] = ((4, 6), (3, 7), (2, 10), (1, 28))

    def activations(self, buffer: Any, indices: Sequence[Expr], flip: bool) -> Expr:
        word = ir.reinterpret("int32", ir.load(buffer, indices, 4))
        if flip:
            word = word ^ ir.constant(-0x7F7F7F80, "int32")
        return ir.reinterpret("uint8x64", ir.broadcast(word, 16))

    def dot(self, sums: Expr, activations: Expr, weights: Expr) -> Expr:
        return ir.call("int32x16", "llvm.x86.avx512.vpdpbusd.512", sums, activations, weights)

    @property
    def narrows(self) -> bool:
        return True

    def round_to_int(self, value: Expr) -> Expr:
        zero, everywhere, current = (
            ir.constant(0, "int32", 16),
            ir.constant(-1, "int16"),
            ir.constant(4, "int32"),
        )
        return ir.call("int32x16", "llvm.x86.avx512.mask.cvtps2dq.512", value, zero, everywhere, current)

    def narrow(self, values: Sequence[Expr], dtype: str, in_order: bool = True) -> Expr:
        padded = [*values, *[values[-1]] * (4 - len(values))]
        halves = [
            ir.call("int16x32", f"llvm.x86.avx512.pack{'ss' if dtype == 'int8' else 'us'}dw.512", *pair)
            for pair in (padded[:2], padded[2:])
        ]
        name = f"llvm.x86.avx512.pack{'ss' if dtype == 'int8' else 'us'}wb.512"
        packed = ir.call(f"{dtype}x64", name, *halves)
        if not in_order:
            return packed
        words = ir.hold(ir.reinterpret("int32x16", packed), "int32", 16)
        order = [lane * 4 + vector for vector in range(4) for lane in range(4)]
        return ir.reinterpret(f"{dtype}x64", ir.shuffle([words], order))


@dataclass(frozen=True)
class Amx(Avx512Vnni):
    """AMX tiles for matrix products, see :mod:`tvm_backend.kernels.tiles`, and 512-bit vectors for everything else."""

    name: str = "amx_int8"

    @property
    def vector(self) -> InstructionSet:
        return Avx512Vnni()


@dataclass(frozen=True)
class Avx2(InstructionSet):
    """``vpmaddwd`` on 256-bit registers.

    ``vpmaddubsw`` would do twice the products, but saturates at 16 bits; widening to 16 bits first is exact.
    """

    name: str = "avx2"
    lanes: int = 8
    group: int = 2
    unsigned: bool = False
    tiles: tuple[tuple[int, int], ...] = ((2, 5), (1, 10))

    def activations(self, buffer: Any, indices: Sequence[Expr], flip: bool) -> Expr:
        assert not flip
        pair = ir.reinterpret("int32", ir.cast(ir.load(buffer, indices, 2), "int16", 2))
        return ir.reinterpret("int16x16", ir.broadcast(pair, 8))

    def dot(self, sums: Expr, activations: Expr, weights: Expr) -> Expr:
        wide = ir.cast(weights, "int16", 16)
        return sums + ir.call("int32x8", "llvm.x86.avx2.pmadd.wd", activations, wide)


def _has(target: Target, *features: str) -> bool:
    with target:
        return all(codegen.target_has_features(feature, target) for feature in features)


def select(target: Target) -> InstructionSet:
    """The best instruction set that a target has."""
    if str(target.kind.name if hasattr(target.kind, "name") else target.kind) != "llvm":
        return Portable()
    if _has(target, "avx512vnni", "avx512bw", "avx512vl"):
        return Amx() if _has(target, "amx-tile", "amx-int8") else Avx512Vnni()
    if _has(target, "avx2"):
        return Avx2()
    return Portable()
