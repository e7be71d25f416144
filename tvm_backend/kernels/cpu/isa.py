"""Instruction sets: how a vector of sums takes up one group of products.

A kernel multiplies ``group`` consecutive activations of one pixel with the weights of ``lanes`` output channels, laid
out ``[lanes][group]``, and adds the products to ``lanes`` int32 sums.  An instruction set says how.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.target import Target, codegen

from tvm_backend.kernels.cpu import ir
from tvm_backend.kernels.cpu.ir import Expr

__all__ = [
    "Amx",
    "Avx2",
    "Avx2Bytes",
    "Avx512Vnni",
    "AvxVnni",
    "InstructionSet",
    "NeonDot",
    "Portable",
    "Sse41",
    "select",
]


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
    takes : {"uint8", "int8", ""}
        The type that activations must have, if any; others are offset by 128, which turns their highest bit.
    operand : str
        Type of the activations as the instruction takes them.
    tiles : tuple of (int, int)
        Register tiles, each as (vectors, most pixels), best first.
    """

    name: str
    lanes: int
    group: int
    takes: str
    operand: str
    tiles: tuple[tuple[int, int], ...]

    @property
    def unit(self) -> int:
        """Bytes of one weight vector."""
        return self.lanes * self.group

    @property
    def vector(self) -> InstructionSet:
        """The set of the kernels that work on vectors only."""
        return self

    def for_values(self, activation: int, weight: int) -> InstructionSet:
        """The set for activations (as :attr:`takes` says) and weights up to these magnitudes."""
        return self

    def activations(self, buffer: Any, indices: Sequence[Expr], flip: bool) -> Expr:
        """`group` activations, in every lane; `flip` offsets them by 128."""
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
    takes: str = ""
    operand: str = "int16"
    tiles: tuple[tuple[int, int], ...] = ((2, 2), (1, 4))

    def activations(self, buffer: Any, indices: Sequence[Expr], flip: bool) -> Expr:
        assert not flip
        return ir.broadcast(ir.cast(ir.load(buffer, indices), "int16"), self.lanes)

    def dot(self, sums: Expr, activations: Expr, weights: Expr) -> Expr:
        product = activations * ir.cast(weights, "int16", self.lanes)
        return sums + ir.cast(product, "int32", self.lanes)


@dataclass(frozen=True)
class _FourBytes(InstructionSet):
    """What sets share that multiply four bytes of a pixel with four of each channel."""

    instruction: ClassVar[str]

    def activations(self, buffer: Any, indices: Sequence[Expr], flip: bool) -> Expr:
        word = ir.reinterpret("int32", ir.load(buffer, indices, 4))
        if flip:
            word = word ^ ir.constant(-0x7F7F7F80, "int32")
        return ir.reinterpret(f"{self.operand}x{self.unit}", ir.broadcast(word, self.lanes))

    def dot(self, sums: Expr, activations: Expr, weights: Expr) -> Expr:
        return ir.call(f"int32x{self.lanes}", self.instruction, sums, activations, weights)


@dataclass(frozen=True)
class _X86(InstructionSet):
    """What the x86 sets share: rounding, and narrowing with saturation, on 256 or 512 bits."""

    @property
    def narrows(self) -> bool:
        return True

    def round_to_int(self, value: Expr) -> Expr:
        if self.lanes == 8:
            return ir.call("int32x8", "llvm.x86.avx.cvt.ps2dq.256", value)
        zero, everywhere, current = (
            ir.constant(0, "int32", 16),
            ir.constant(-1, "int16"),
            ir.constant(4, "int32"),
        )
        return ir.call("int32x16", "llvm.x86.avx512.mask.cvtps2dq.512", value, zero, everywhere, current)

    def narrow(self, values: Sequence[Expr], dtype: str, in_order: bool = True) -> Expr:
        sign = "ss" if dtype == "int8" else "us"
        name, end = ("llvm.x86.avx2.pack", "") if self.lanes == 8 else ("llvm.x86.avx512.pack", ".512")
        lanes = self.lanes
        padded = [*values, *[values[-1]] * (4 - len(values))]
        # Signed words first: unsigned ones above 32767 would be taken for negative ones afterwards.
        pairs = (padded[:2], padded[2:])
        halves = [ir.call(f"int16x{2 * lanes}", f"{name}ssdw{end}", *pair) for pair in pairs]
        packed = ir.call(f"{dtype}x{4 * lanes}", f"{name}{sign}wb{end}", *halves)
        if not in_order:
            return packed
        words = ir.hold(ir.reinterpret(f"int32x{lanes}", packed), "int32", lanes)
        order = [lane * 4 + vector for vector in range(4) for lane in range(lanes // 4)]
        return ir.reinterpret(f"{dtype}x{4 * lanes}", ir.shuffle([words], order))


@dataclass(frozen=True)
class Avx512Vnni(_FourBytes, _X86):
    """``vpdpbusd`` on 512-bit registers: 64 products of uint8 and int8 an instruction."""

    name: str = "avx512_vnni"
    lanes: int = 16
    group: int = 4
    takes: str = "uint8"
    operand: str = "uint8"
    tiles: tuple[tuple[int, int], ...] = ((4, 6), (3, 7), (2, 10), (1, 28))
    instruction: ClassVar[str] = "llvm.x86.avx512.vpdpbusd.512"


@dataclass(frozen=True)
class Amx(Avx512Vnni):
    """AMX tiles for matrix products, see :mod:`tvm_backend.kernels.cpu.tiles`, and 512-bit vectors for everything else."""

    name: str = "amx_int8"

    @property
    def vector(self) -> InstructionSet:
        return Avx512Vnni()


@dataclass(frozen=True)
class AvxVnni(_FourBytes, _X86):
    """``vpdpbusd`` on 256-bit registers, of which there are sixteen."""

    name: str = "avx_vnni"
    lanes: int = 8
    group: int = 4
    takes: str = "uint8"
    operand: str = "uint8"
    tiles: tuple[tuple[int, int], ...] = ((3, 4), (2, 6), (1, 12))
    instruction: ClassVar[str] = "llvm.x86.avx512.vpdpbusd.256"


@dataclass(frozen=True)
class Avx2(_X86):
    """``vpmaddwd`` on 256-bit registers.

    ``vpmaddubsw`` would do twice the products, but saturates at 16 bits; widening to 16 bits first is exact.  Where the
    values are small enough, :class:`Avx2Bytes` uses it.
    """

    name: str = "avx2"
    lanes: int = 8
    group: int = 2
    takes: str = ""
    operand: str = "int16"
    tiles: tuple[tuple[int, int], ...] = ((2, 5), (1, 10))

    def for_values(self, activation: int, weight: int) -> InstructionSet:
        return Avx2Bytes() if 2 * activation * weight < 1 << 15 else self

    def activations(self, buffer: Any, indices: Sequence[Expr], flip: bool) -> Expr:
        assert not flip
        if buffer.dtype == "int16":
            word = ir.reinterpret("int32", ir.load(buffer, indices, 2))
            return ir.reinterpret(f"int16x{self.unit}", ir.broadcast(word, self.lanes))
        # Broadcast first and widened then, both by vector instructions.
        pair = ir.reinterpret("int16", ir.load(buffer, indices, 2))
        bytes_ = ir.reinterpret(f"{buffer.dtype}x{self.unit}", ir.broadcast(pair, self.lanes))
        return ir.cast(bytes_, "int16", self.unit)

    def dot(self, sums: Expr, activations: Expr, weights: Expr) -> Expr:
        wide = ir.cast(weights, "int16", self.unit)
        name = "llvm.x86.avx2.pmadd.wd" if self.lanes == 8 else "llvm.x86.sse2.pmadd.wd"
        return sums + ir.call(f"int32x{self.lanes}", name, activations, wide)


@dataclass(frozen=True)
class Sse41(Avx2):
    """The same on 128-bit registers."""

    name: str = "sse4.1"
    lanes: int = 4

    def for_values(self, activation: int, weight: int) -> InstructionSet:
        return self

    @property
    def narrows(self) -> bool:
        return False


@dataclass(frozen=True)
class Avx2Bytes(_FourBytes, _X86):
    """``vpmaddubsw``, for values of which two products fit into 16 bits: 4-bit weights, or 7-bit activations."""

    name: str = "avx2_bytes"
    lanes: int = 8
    group: int = 4
    takes: str = "uint8"
    operand: str = "uint8"
    tiles: tuple[tuple[int, int], ...] = ((3, 3), (2, 5), (1, 10))

    def dot(self, sums: Expr, activations: Expr, weights: Expr) -> Expr:
        pairs = ir.call("int16x16", "llvm.x86.avx2.pmadd.ub.sw", activations, weights)
        return sums + ir.call("int32x8", "llvm.x86.avx2.pmadd.wd", pairs, ir.constant(1, "int16", 16))


@dataclass(frozen=True)
class NeonDot(_FourBytes):
    """``sdot`` of Arm's dot-product extension: 16 products of int8 an instruction, in 32 registers of 128 bits."""

    name: str = "neon_dot"
    lanes: int = 4
    group: int = 4
    takes: str = "int8"
    operand: str = "int8"
    tiles: tuple[tuple[int, int], ...] = ((4, 6), (2, 10), (1, 20))
    instruction: ClassVar[str] = "llvm.aarch64.neon.sdot"


def _has(target: Target, *features: str) -> bool:
    with target:
        return all(codegen.target_has_features(feature, target) for feature in features)


def select(target: Target) -> InstructionSet:
    """The best instruction set that a target has."""
    if str(target.kind.name if hasattr(target.kind, "name") else target.kind) != "llvm":
        return Portable()
    if _has(target, "avx512vnni", "avx512bw", "avx512vl"):
        return Amx() if _has(target, "amx-tile", "amx-int8") else Avx512Vnni()
    if _has(target, "avxvnni"):
        return AvxVnni()
    if _has(target, "avx2"):
        return Avx2()
    if _has(target, "sse4.1"):
        return Sse41()
    if _has(target, "dotprod"):
        return NeonDot()
    return Portable()
