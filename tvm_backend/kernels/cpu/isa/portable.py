"""Plain vector arithmetic, for processors without anything better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm_backend.kernels import tir
from tvm_backend.kernels.cpu.isa.base import InstructionSet
from tvm_backend.kernels.tir import Expr

__all__ = ["Portable"]


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
        """One activation in every lane, widened."""
        assert not flip
        return tir.broadcast(tir.cast(tir.load(buffer, indices), "int16"), self.lanes)

    def dot(self, sums: Expr, activations: Expr, weights: Expr) -> Expr:
        """The sums with one product each added."""
        product = activations * tir.cast(weights, "int16", self.lanes)
        return sums + tir.cast(product, "int32", self.lanes)
