"""The base class of generators of CUDA kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Self, TypeVar

from tvm_backend.kernels.cuda.isa import Cuda
from tvm_backend.kernels.kernel import Generator
from tvm_backend.kernels.spec import KernelSpec

__all__ = ["CudaGenerator"]

_Spec = TypeVar("_Spec", bound=KernelSpec)


@dataclass(frozen=True)
class CudaGenerator(Generator[_Spec, Cuda], Generic[_Spec]):
    """A generator whose kernels run on every CUDA device."""

    @classmethod
    def make(cls, spec: _Spec, isa: Cuda) -> Self:
        """The generator, which makes no use of what only some devices have."""
        return cls(spec, Cuda())
