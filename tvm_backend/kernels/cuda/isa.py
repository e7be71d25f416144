"""What GPUs have for products of bytes, and which of it a target has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from cat_plugin.errors import CompileError
from tvm_backend.kernels.kernel import Machine

__all__ = ["Cuda", "Dp4a", "TensorCores", "capability", "select"]


@dataclass(frozen=True)
class Cuda(Machine):
    """A CUDA device of which a kernel needs nothing but threads.

    Attributes
    ----------
    least : int
        The compute capability from which on there are such devices, 80 for ``sm_80``.
    """

    device: ClassVar[Literal["cpu", "cuda"]] = "cuda"
    prefix: ClassVar[str] = "cuda_"
    least: ClassVar[int] = 0

    name: str = "cuda"


@dataclass(frozen=True)
class TensorCores(Cuda):
    """int8 products of matrices by the warps' ``mma`` instruction."""

    least: ClassVar[int] = 80

    name: str = "cuda_mma"


@dataclass(frozen=True)
class Dp4a(Cuda):
    """Four products of bytes an instruction, in each thread."""

    least: ClassVar[int] = 61

    name: str = "cuda_dp4a"


def capability(target: Any) -> int:
    """The compute capability of a CUDA target, 90 for ``sm_90``.

    Parameters
    ----------
    target : tvm.target.Target
        With its architecture.

    Raises
    ------
    CompileError
        The target does not say, or is too old for dp4a.
    """
    match = re.fullmatch(r"sm_(\d+)[af]?", str(target.attrs.get("arch", "") or ""))
    if match is None:
        raise CompileError(
            'the CUDA target names no architecture; give one, for example {"kind": "cuda", "arch": "sm_90"}'
        )
    if int(match[1]) < 61:
        raise CompileError(f"sm_{match[1]} has no integer dot product; the CUDA kernels need sm_61 or later")
    return int(match[1])


def select(target: Any) -> Cuda:
    """The best products that a target has; errors as for :func:`capability`."""
    found = capability(target)
    return next(machine for machine in (TensorCores(), Dp4a()) if found >= machine.least)
