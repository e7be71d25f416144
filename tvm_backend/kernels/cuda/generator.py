"""The base class of generators of CUDA kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Self, TypeVar

from tvm_backend.kernels.cuda.isa import Cuda
from tvm_backend.kernels.kernel import Generator
from tvm_backend.kernels.spec import KernelSpec

__all__ = ["CudaGenerator"]

Spec = TypeVar("Spec", bound=KernelSpec)


@dataclass(frozen=True)
class CudaGenerator(Generator[Spec, Cuda], Generic[Spec]):
    """A generator whose kernels run on every CUDA device."""

    @classmethod
    def make(cls, spec: Spec, isa: Cuda) -> Self:
        """The generator, which makes no use of what only some devices have."""
        return cls(spec, Cuda())
