"""Instruction sets of Arm processors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tvm_backend.kernels.cpu.isa.base import FourBytes

__all__ = ["NeonDot"]


@dataclass(frozen=True)
class NeonDot(FourBytes):
    """``sdot`` of Arm's dot-product extension: 16 products of int8 an instruction, in 32 registers of 128 bits."""

    features: ClassVar[tuple[str, ...]] = ("dotprod",)
    instruction: ClassVar[str] = "llvm.aarch64.neon.sdot"
    fuses: ClassVar[bool] = True

    name: str = "neon_dot"
    lanes: int = 4
    group: int = 4
    takes: str = "int8"
    operand: str = "int8"
    tiles: tuple[tuple[int, int], ...] = ((4, 6), (2, 10), (1, 20))
