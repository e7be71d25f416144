"""The base class of generators of kernels for processors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Self, TypeVar

from tvm_backend.kernels.cpu.isa import InstructionSet
from tvm_backend.kernels.kernel import Generator
from tvm_backend.kernels.spec import KernelSpec

__all__ = ["CpuGenerator"]

_Spec = TypeVar("_Spec", bound=KernelSpec)


@dataclass(frozen=True)
class CpuGenerator(Generator[_Spec, InstructionSet], Generic[_Spec]):
    """A generator whose kernels work on vectors, of which the instruction set gives at least the width."""

    @classmethod
    def make(cls, spec: _Spec, isa: InstructionSet) -> Self:
        """The generator on the vectors of an instruction set."""
        return cls(spec, isa.vector)
