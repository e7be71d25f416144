"""The instruction sets of processors, and which of them a target has."""

from __future__ import annotations

from tvm.target import Target, codegen

from tvm_backend.kernels.cpu.isa.arm import NeonDot
from tvm_backend.kernels.cpu.isa.base import InstructionSet
from tvm_backend.kernels.cpu.isa.portable import Portable
from tvm_backend.kernels.cpu.isa.x86 import (
    Amx,
    Avx2,
    Avx2Bytes,
    Avx512Bw,
    Avx512Bytes,
    Avx512Vnni,
    AvxVnni,
    AvxVnniInt8,
    Sse41,
)

__all__ = [
    "INSTRUCTION_SETS",
    "Amx",
    "Avx2",
    "Avx2Bytes",
    "Avx512Bw",
    "Avx512Bytes",
    "Avx512Vnni",
    "AvxVnni",
    "AvxVnniInt8",
    "InstructionSet",
    "NeonDot",
    "Portable",
    "Sse41",
    "select",
]

INSTRUCTION_SETS: tuple[InstructionSet, ...] = (
    Amx(),
    Avx512Vnni(),
    Avx512Bw(),
    AvxVnniInt8(),
    AvxVnni(),
    Avx2(),
    Sse41(),
    NeonDot(),
)
"""Those that a target is asked for, best first."""


def select(target: Target) -> InstructionSet:
    """The best instruction set that a processor has; :class:`Portable` where it has none of them."""
    if target.kind.name != "llvm":
        return Portable()
    with target:
        for isa in INSTRUCTION_SETS:
            if all(codegen.target_has_features(feature, target) for feature in isa.features):
                return isa
    return Portable()
