"""From a specification and a target to a kernel: the one table of all generators."""

from __future__ import annotations

import functools
from typing import Any

from tvm.target import Target

from cat_plugin.errors import CompileError
from tvm_backend.kernels import cuda
from tvm_backend.kernels.cpu import isa
from tvm_backend.kernels.cpu.border import Dequantize, Quantize
from tvm_backend.kernels.cpu.concat import Concat
from tvm_backend.kernels.cpu.conv2d import DirectConv
from tvm_backend.kernels.cpu.conv2d_amx import AmxConv
from tvm_backend.kernels.cpu.depthwise import Depthwise
from tvm_backend.kernels.cpu.depthwise_dot import DepthwiseDot
from tvm_backend.kernels.cpu.elementwise import Elementwise
from tvm_backend.kernels.cpu.linear import Linear
from tvm_backend.kernels.cpu.linear_amx import AmxLinear
from tvm_backend.kernels.cpu.pool import Pool
from tvm_backend.kernels.cpu.subsample import Subsample
from tvm_backend.kernels.cuda.dp4a import Dp4aProduct
from tvm_backend.kernels.cuda.grouped import Grouped
from tvm_backend.kernels.cuda.mma import MmaProduct
from tvm_backend.kernels.cuda.pointwise import (
    CudaConcat,
    CudaDequantize,
    CudaElementwise,
    CudaQuantize,
    CudaSubsample,
)
from tvm_backend.kernels.cuda.pool import CudaPool
from tvm_backend.kernels.kernel import Generator, Kernel, Machine
from tvm_backend.kernels.spec import (
    ConcatSpec,
    ConvSpec,
    DequantizeSpec,
    ElementwiseSpec,
    KernelSpec,
    LinearSpec,
    PoolSpec,
    QuantizeSpec,
    SubsampleSpec,
)

__all__ = ["GENERATORS", "lower", "machine_of"]

GENERATORS: dict[type[KernelSpec], dict[str, tuple[type[Generator[Any, Any]], ...]]] = {
    ConvSpec: {
        "cpu": (DepthwiseDot, Depthwise, AmxConv, DirectConv),
        "cuda": (Grouped, MmaProduct, Dp4aProduct),
    },
    LinearSpec: {"cpu": (AmxLinear, Linear), "cuda": (MmaProduct, Dp4aProduct)},
    PoolSpec: {"cpu": (Pool,), "cuda": (CudaPool,)},
    ElementwiseSpec: {"cpu": (Elementwise,), "cuda": (CudaElementwise,)},
    ConcatSpec: {"cpu": (Concat,), "cuda": (CudaConcat,)},
    SubsampleSpec: {"cpu": (Subsample,), "cuda": (CudaSubsample,)},
    QuantizeSpec: {"cpu": (Quantize,), "cuda": (CudaQuantize,)},
    DequantizeSpec: {"cpu": (Dequantize,), "cuda": (CudaDequantize,)},
}
"""For each kind of specification and each device its generators; the first that takes a specification writes it."""


def machine_of(target: Target) -> Machine:
    """What kernels for a target are written for."""
    return cuda.select(target) if target.kind.name == "cuda" else isa.select(target)


def lower(spec: KernelSpec, target: Target) -> Kernel:
    """Choose and build the kernel for a specification.

    Parameters
    ----------
    spec : KernelSpec
        What to compute.
    target : tvm.target.Target
        Where; its CPU, or its CUDA architecture, decides on the instructions.

    Returns
    -------
    Kernel
        The function with what prepares its weight.  Equal arguments give the same object.

    Raises
    ------
    CompileError
        If no kernel computes `spec`.
    """
    return _lower(spec, machine_of(target))


@functools.lru_cache(maxsize=1024)
def _lower(spec: KernelSpec, machine: Machine) -> Kernel:
    for generator in GENERATORS.get(type(spec), {}).get(machine.device, ()):
        if generator.takes(spec, machine):
            return Kernel.of(generator.make(spec, machine))
    raise CompileError(
        f"there is no kernel for {type(spec).__name__} on {machine.name}; see tvm_backend.kernels.registry"
    )
