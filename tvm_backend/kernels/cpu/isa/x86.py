"""Instruction sets of x86 processors, on registers of 128, 256 and 512 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from tvm_backend.kernels import tir
from tvm_backend.kernels.cpu import ir
from tvm_backend.kernels.cpu.isa.base import FourBytes, InstructionSet
from tvm_backend.kernels.tir import Expr

__all__ = [
    "Amx",
    "Avx2",
    "Avx2Bytes",
    "Avx512Bw",
    "Avx512Bytes",
    "Avx512Vnni",
    "AvxVnni",
    "AvxVnniInt8",
    "Sse41",
]

_MOST = (1 << 15) - 1  # what 16 bits hold


@dataclass(frozen=True)
class _Narrowing(InstructionSet):
    """What sets on wide registers share: narrowing with saturation, within 128-bit lanes.

    Attributes
    ----------
    pack, suffix : str
        LLVM's names of the instructions are ``pack + kind + suffix``.
    """

    pack: ClassVar[str]
    suffix: ClassVar[str] = ""

    @property
    def narrows(self) -> bool:
        """There are such instructions."""
        return True

    def narrow(self, values: Sequence[Expr], dtype: str, in_order: bool = True) -> Expr:
        """Up to four int32 vectors to bytes, with saturation, by two narrowings."""
        sign, lanes = "ss" if dtype == "int8" else "us", self.lanes
        padded = [*values, *[values[-1]] * (4 - len(values))]
        # Signed words first: unsigned ones above 32767 would be taken for negative ones afterwards.
        pairs = (padded[:2], padded[2:])
        halves = [ir.call(f"int16x{2 * lanes}", f"{self.pack}ssdw{self.suffix}", *pair) for pair in pairs]
        packed = ir.call(f"{dtype}x{4 * lanes}", f"{self.pack}{sign}wb{self.suffix}", *halves)
        if not in_order:
            return packed
        words = ir.hold(tir.reinterpret(f"int32x{lanes}", packed), "int32", lanes)
        order = [lane * 4 + vector for vector in range(4) for lane in range(lanes // 4)]
        return tir.reinterpret(f"{dtype}x{4 * lanes}", tir.shuffle([words], order))


@dataclass(frozen=True)
class _Ymm(_Narrowing):
    """256-bit registers, of which there are sixteen."""

    pack: ClassVar[str] = "llvm.x86.avx2.pack"
    fuses: ClassVar[bool] = True

    def round_to_int(self, value: Expr) -> Expr:
        """By ``vcvtps2dq``."""
        return ir.call("int32x8", "llvm.x86.avx.cvt.ps2dq.256", value)


@dataclass(frozen=True)
class _Zmm(_Narrowing):
    """512-bit registers, of which there are 32."""

    pack: ClassVar[str] = "llvm.x86.avx512.pack"
    fuses: ClassVar[bool] = True
    suffix: ClassVar[str] = ".512"

    def round_to_int(self, value: Expr) -> Expr:
        """By ``vcvtps2dq`` in all lanes, with the current rounding mode."""
        zero, everywhere, current = (
            tir.constant(0, "int32", 16),
            tir.constant(-1, "int16"),
            tir.constant(4, "int32"),
        )
        return ir.call("int32x16", "llvm.x86.avx512.mask.cvtps2dq.512", value, zero, everywhere, current)


@dataclass(frozen=True)
class Avx512Vnni(FourBytes, _Zmm):
    """``vpdpbusd`` on 512-bit registers: 64 products of uint8 and int8 an instruction."""

    features: ClassVar[tuple[str, ...]] = ("avx512vnni", "avx512bw", "avx512vl")
    instruction: ClassVar[str] = "llvm.x86.avx512.vpdpbusd.512"

    name: str = "avx512_vnni"
    lanes: int = 16
    group: int = 4
    takes: str = "uint8"
    operand: str = "uint8"
    tiles: tuple[tuple[int, int], ...] = ((4, 6), (3, 7), (2, 10), (1, 28))


@dataclass(frozen=True)
class Amx(Avx512Vnni):
    """AMX tiles for matrix products, see :mod:`tvm_backend.kernels.cpu.tiles`, and 512-bit vectors for everything else."""

    features: ClassVar[tuple[str, ...]] = (*Avx512Vnni.features, "amx-tile", "amx-int8")
    has_tile_state: ClassVar[bool] = True

    name: str = "amx_int8"

    @property
    def vector(self) -> InstructionSet:
        """The 512-bit vectors."""
        return Avx512Vnni()


@dataclass(frozen=True)
class AvxVnni(FourBytes, _Ymm):
    """``vpdpbusd`` on 256-bit registers."""

    features: ClassVar[tuple[str, ...]] = ("avxvnni",)
    instruction: ClassVar[str] = "llvm.x86.avx512.vpdpbusd.256"

    name: str = "avx_vnni"
    lanes: int = 8
    group: int = 4
    takes: str = "uint8"
    operand: str = "uint8"
    tiles: tuple[tuple[int, int], ...] = ((3, 4), (2, 6), (1, 12))


@dataclass(frozen=True)
class AvxVnniInt8(AvxVnni):
    """``vpdpbssd`` as well, for signed activations, which are then multiplied as they are.

    Attributes
    ----------
    signed : str
        LLVM's name of it.
    """

    features: ClassVar[tuple[str, ...]] = ("avxvnniint8", *AvxVnni.features)
    signed: ClassVar[str] = "llvm.x86.avx2.vpdpbssd.256"

    name: str = "avx_vnni_int8"
    takes: str = ""
    operand: str = ""

    def dot(self, sums: Expr, activations: Expr, weights: Expr) -> Expr:
        """The sums with the products added, by the instruction for the activations' type."""
        signed = tir.dtype_of(activations) == "int8"
        name = self.signed if signed else self.instruction
        return ir.call(f"int32x{self.lanes}", name, sums, activations, weights)


@dataclass(frozen=True)
class _TwoWords(InstructionSet):
    """``pmaddwd``: two activations of a pixel, widened to 16 bits, with two weights of each channel; exact for all values."""

    instruction: ClassVar[str]

    def activations(self, buffer: Any, indices: Sequence[Expr], flip: bool) -> Expr:
        """Two activations in every lane; the sets take both signs, so nothing is offset."""
        assert not flip
        if buffer.dtype == "int16":
            word = tir.reinterpret("int32", tir.load(buffer, indices, 2))
            return tir.reinterpret(f"int16x{self.unit}", tir.broadcast(word, self.lanes))
        # Broadcast first and widened then, both by vector instructions.
        pair = tir.reinterpret("int16", tir.load(buffer, indices, 2))
        bytes_ = tir.reinterpret(f"{buffer.dtype}x{self.unit}", tir.broadcast(pair, self.lanes))
        return tir.cast(bytes_, "int16", self.unit)

    def dot(self, sums: Expr, activations: Expr, weights: Expr) -> Expr:
        """The sums with pairs of products added."""
        wide = tir.cast(weights, "int16", self.unit)
        return sums + ir.call(f"int32x{self.lanes}", self.instruction, activations, wide)


@dataclass(frozen=True)
class _Bytes(FourBytes):
    """``pmaddubsw``, for values of which two products fit into 16 bits: 4-bit weights, or 7-bit activations.

    Attributes
    ----------
    pairs, words : str
        LLVM's names of the instructions that add up products of bytes, and of words.
    """

    pairs: ClassVar[str]
    words: ClassVar[str]

    def deep(self, activation: int, pair: int, four: int | None = None) -> InstructionSet | None:
        """The set for values up to these magnitudes; None where two products do not fit."""
        most = _MOST // max(1, activation * pair)
        if most == 1 and four is not None and activation * four <= _MOST:
            most = 2
        # Powers of two, so that layers with similar weights share their kernels.
        return replace(self, depth=1 << most.bit_length() - 1) if most else None

    def for_sums(self, activation: int, pair: int, four: int | None = None) -> InstructionSet:
        """With as many steps in 16 bits as the values allow."""
        return self.deep(activation, pair, four) or self

    def holds(self, activation: int, pair: int, four: int | None = None) -> bool:
        """Whether :attr:`depth` steps fit into 16 bits."""
        found = self.deep(activation, pair, four)
        return found is not None and found.depth >= self.depth

    def products(self, activations: Expr, weights: Expr) -> Expr:
        """Sums of two products, in 16 bits."""
        return ir.call(f"int16x{2 * self.lanes}", self.pairs, activations, weights)

    def widen(self, sums: Expr, products: Expr) -> Expr:
        """The sums with two words each added: a product with ones."""
        ones = tir.constant(1, "int16", 2 * self.lanes)
        return sums + ir.call(f"int32x{self.lanes}", self.words, products, ones)

    def dot(self, sums: Expr, activations: Expr, weights: Expr) -> Expr:
        """The sums with products added in pairs of bytes, then of words."""
        return self.widen(sums, self.products(activations, weights))


@dataclass(frozen=True)
class Avx2Bytes(_Bytes, _Ymm):
    """``vpmaddubsw`` on 256-bit registers."""

    pairs: ClassVar[str] = "llvm.x86.avx2.pmadd.ub.sw"
    words: ClassVar[str] = "llvm.x86.avx2.pmadd.wd"

    name: str = "avx2_bytes"
    lanes: int = 8
    group: int = 4
    takes: str = "uint8"
    operand: str = "uint8"
    tiles: tuple[tuple[int, int], ...] = ((2, 6), (3, 3), (1, 12))


@dataclass(frozen=True)
class Avx512Bytes(_Bytes, _Zmm):
    """``vpmaddubsw`` on 512-bit registers."""

    pairs: ClassVar[str] = "llvm.x86.avx512.pmaddubs.w.512"
    words: ClassVar[str] = "llvm.x86.avx512.pmaddw.d.512"

    name: str = "avx512bw_bytes"
    lanes: int = 16
    group: int = 4
    takes: str = "uint8"
    operand: str = "uint8"
    tiles: tuple[tuple[int, int], ...] = ((4, 6), (3, 7), (2, 10), (1, 24))


@dataclass(frozen=True)
class Avx2(_TwoWords, _Ymm):
    """``vpmaddwd`` on 256-bit registers.

    ``vpmaddubsw`` would do twice the products, but saturates at 16 bits; widening to 16 bits first is exact.  Where the
    values are small enough, :class:`Avx2Bytes` uses it.
    """

    features: ClassVar[tuple[str, ...]] = ("avx2",)
    instruction: ClassVar[str] = "llvm.x86.avx2.pmadd.wd"

    name: str = "avx2"
    lanes: int = 8
    group: int = 2
    takes: str = ""
    operand: str = "int16"
    tiles: tuple[tuple[int, int], ...] = ((2, 5), (1, 10))

    def for_sums(self, activation: int, pair: int, four: int | None = None) -> InstructionSet:
        """Bytes where two products fit into 16 bits."""
        return Avx2Bytes().deep(activation, pair, four) or self


@dataclass(frozen=True)
class Avx512Bw(_TwoWords, _Zmm):
    """``vpmaddwd`` on 512-bit registers, for processors with AVX-512 but no VNNI; :class:`Avx512Bytes` for small values."""

    features: ClassVar[tuple[str, ...]] = ("avx512bw",)
    instruction: ClassVar[str] = "llvm.x86.avx512.pmaddw.d.512"

    name: str = "avx512bw"
    lanes: int = 16
    group: int = 2
    takes: str = ""
    operand: str = "int16"
    tiles: tuple[tuple[int, int], ...] = ((4, 6), (3, 7), (2, 10), (1, 24))

    def for_sums(self, activation: int, pair: int, four: int | None = None) -> InstructionSet:
        """Bytes where two products fit into 16 bits."""
        return Avx512Bytes().deep(activation, pair, four) or self


@dataclass(frozen=True)
class Sse41(_TwoWords):
    """The same on 128-bit registers."""

    features: ClassVar[tuple[str, ...]] = ("sse4.1",)
    instruction: ClassVar[str] = "llvm.x86.sse2.pmadd.wd"

    name: str = "sse4.1"
    lanes: int = 4
    group: int = 2
    takes: str = ""
    operand: str = "int16"
    tiles: tuple[tuple[int, int], ...] = ((2, 5), (1, 10))
