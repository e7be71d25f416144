"""How a vector of sums takes up one group of products: the interface of all instruction sets.

A kernel multiplies ``group`` consecutive activations of one pixel with the weights of ``lanes`` output channels, laid
out ``[lanes][group]``, and adds the products to ``lanes`` int32 sums.  An instruction set says how.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from tvm_backend.kernels import tir
from tvm_backend.kernels.cpu import ir
from tvm_backend.kernels.kernel import Machine
from tvm_backend.kernels.tir import Expr

__all__ = ["FourBytes", "InstructionSet"]


@dataclass(frozen=True)
class InstructionSet(Machine):
    """Base class: what a kernel asks of the vectors that it works on.

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
        Type of the activations as the instruction takes them; empty where it takes both.
    tiles : tuple of (int, int)
        Register tiles, each as (vectors, most pixels), best first.
    depth : int
        Groups whose products :meth:`products` may add up in 16 bits before they are widened; 1 where sums are int32 at once.

    Attributes
    ----------
    features : tuple of str
        What a processor must have, by LLVM's names.
    fuses : bool
        Whether float32 is multiplied and added by one instruction.
    """

    device: ClassVar[Literal["cpu", "cuda"]] = "cpu"
    fuses: ClassVar[bool] = False
    features: ClassVar[tuple[str, ...]] = ()

    lanes: int
    group: int
    takes: str
    operand: str
    tiles: tuple[tuple[int, int], ...]
    depth: int = 1

    @property
    def unit(self) -> int:
        """Bytes of one weight vector."""
        return self.lanes * self.group

    @property
    def vector(self) -> InstructionSet:
        """The set of the kernels that work on vectors only."""
        return self

    @property
    def by_values(self) -> bool:
        """Whether smaller values may have another set, so that :meth:`for_sums` and :meth:`holds` are worth asking."""
        return type(self).for_sums is not InstructionSet.for_sums

    def for_values(self, activation: int, weight: int) -> InstructionSet:
        """The set for activations (as :attr:`takes` says) and weights up to these magnitudes."""
        return self.for_sums(activation, 2 * weight)

    def for_sums(self, activation: int, pair: int, four: int | None = None) -> InstructionSet:
        """The same where neighbouring weights of one sign add up to at most so much.

        Parameters
        ----------
        activation : int
            The largest activation.
        pair, four : int
            What two weights beside each other, and these with the two that follow in the next group, add up to; by default
            `four` is twice `pair`.
        """
        return self

    def holds(self, activation: int, pair: int, four: int | None = None) -> bool:
        """Whether sums of products up to these magnitudes fit; as for :meth:`for_sums`."""
        return True

    @abstractmethod
    def activations(self, buffer: Any, indices: Sequence[Expr], flip: bool) -> Expr:
        """`group` activations, in every lane; `flip` offsets them by 128."""

    def weights(self, buffer: Any, indices: Sequence[Expr]) -> Expr:
        """One vector of int8 weights."""
        return tir.load(buffer, indices, self.unit)

    @abstractmethod
    def dot(self, sums: Expr, activations: Expr, weights: Expr) -> Expr:
        """The sums with the products added."""

    def products(self, activations: Expr, weights: Expr) -> Expr:
        """The products in 16 bits, two lanes for each sum; there where :attr:`depth` is more than 1."""
        raise NotImplementedError

    def widen(self, sums: Expr, products: Expr) -> Expr:
        """The sums with products of 16 bits, or sums of such, added."""
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
class FourBytes(InstructionSet):
    """What sets share that multiply four bytes of a pixel with four of each channel.

    Attributes
    ----------
    instruction : str
        LLVM's name of the one that takes sums, activations and weights.
    """

    instruction: ClassVar[str]

    def activations(self, buffer: Any, indices: Sequence[Expr], flip: bool) -> Expr:
        """A word of four in every lane."""
        word = tir.reinterpret("int32", tir.load(buffer, indices, 4))
        if flip:
            word = word ^ tir.constant(-0x7F7F7F80, "int32")
        operand = self.operand or buffer.dtype
        return tir.reinterpret(f"{operand}x{self.unit}", tir.broadcast(word, self.lanes))

    def dot(self, sums: Expr, activations: Expr, weights: Expr) -> Expr:
        """The sums with the products added, by one instruction."""
        return ir.call(f"int32x{self.lanes}", self.instruction, sums, activations, weights)
