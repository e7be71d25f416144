"""From a specification and a target to a kernel: the one table of all references and generators."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from tvm.target import Target

from cat_plugin.errors import CompileError
from tvm_backend.kernels import cuda
from tvm_backend.kernels.cpu import (
    border,
    concat,
    conv2d,
    elementwise,
    grouped_linear,
    isa,
    linear,
    pool,
    product,
    rotation,
    rows,
    subsample,
    tokens,
)
from tvm_backend.kernels.cpu.conv2d_amx import AmxConv
from tvm_backend.kernels.cpu.depthwise import Depthwise
from tvm_backend.kernels.cpu.depthwise_dot import DepthwiseDot
from tvm_backend.kernels.cpu.linear_amx import AmxLinear
from tvm_backend.kernels.cuda.dp4a import Dp4aProduct
from tvm_backend.kernels.cuda.grouped import Grouped
from tvm_backend.kernels.cuda.mma import MmaProduct
from tvm_backend.kernels.cuda.pairs import PairProduct
from tvm_backend.kernels.cuda.pointwise import (
    CudaConcat,
    CudaDequantize,
    CudaElementwise,
    CudaQuantize,
    CudaSubsample,
)
from tvm_backend.kernels.cuda.pool import CudaPool
from tvm_backend.kernels.cuda.rows import CudaEach, CudaRows
from tvm_backend.kernels.kernel import Generator, Kernel, Machine
from tvm_backend.kernels.spec import (
    ConcatSpec,
    ConvSpec,
    DequantizeSpec,
    ElementwiseSpec,
    GroupedLinearSpec,
    KernelSpec,
    LinearSpec,
    PoolSpec,
    ProductSpec,
    QuantizeSpec,
    RotationSpec,
    RowsSpec,
    SubsampleSpec,
    TokensSpec,
)

__all__ = ["KERNELS", "Entry", "Reference", "lower", "machine_of", "reference"]

Reference = Callable[..., tuple[NDArray[Any], ...]]
"""What a kernel computes, in numpy: from its specification and its inputs, the weight unpacked, to its outputs."""


@dataclass(frozen=True)
class Entry:
    """All that there is for one kind of specification.

    Parameters
    ----------
    reference : callable
        What every generator's kernels compute, to the bit.
    cpu, cuda : tuple of Generator classes
        For each device its generators, best first; the first that takes a specification writes it.
    """

    reference: Reference
    cpu: tuple[type[Generator[Any, Any]], ...] = ()
    cuda: tuple[type[Generator[Any, Any]], ...] = ()

    def generators(self, machine: Machine) -> tuple[type[Generator[Any, Any]], ...]:
        """Those for a machine."""
        return self.cuda if machine.device == "cuda" else self.cpu


KERNELS: dict[type[KernelSpec], Entry] = {
    ConvSpec: Entry(
        conv2d.reference,
        cpu=(DepthwiseDot, Depthwise, AmxConv, conv2d.DirectConv),
        cuda=(Grouped, MmaProduct, Dp4aProduct),
    ),
    LinearSpec: Entry(linear.reference, cpu=(AmxLinear, linear.Linear), cuda=(MmaProduct, Dp4aProduct)),
    GroupedLinearSpec: Entry(
        grouped_linear.reference, cpu=(grouped_linear.RealLinear, grouped_linear.GroupedLinear)
    ),
    TokensSpec: Entry(tokens.reference, cpu=(tokens.Tokens,)),
    PoolSpec: Entry(pool.reference, cpu=(pool.Pool,), cuda=(CudaPool,)),
    ProductSpec: Entry(product.reference, cpu=(product.Product,), cuda=(PairProduct,)),
    RowsSpec: Entry(rows.reference, cpu=(rows.Rows,), cuda=(CudaEach, CudaRows)),
    RotationSpec: Entry(rotation.reference, cpu=(rotation.Rotation,)),
    ElementwiseSpec: Entry(elementwise.reference, cpu=(elementwise.Elementwise,), cuda=(CudaElementwise,)),
    ConcatSpec: Entry(concat.reference, cpu=(concat.Concat,), cuda=(CudaConcat,)),
    SubsampleSpec: Entry(subsample.reference, cpu=(subsample.Subsample,), cuda=(CudaSubsample,)),
    QuantizeSpec: Entry(border.quantize_reference, cpu=(border.Quantize,), cuda=(CudaQuantize,)),
    DequantizeSpec: Entry(border.dequantize_reference, cpu=(border.Dequantize,), cuda=(CudaDequantize,)),
}
"""For each kind of specification its reference and its generators."""


def reference(spec: KernelSpec) -> Reference:
    """What kernels for a specification compute, in numpy.

    Parameters
    ----------
    spec : KernelSpec
        Of a kind that has an entry in :data:`KERNELS`.

    Returns
    -------
    callable
        To be called with `spec` and the kernel's inputs.
    """
    return KERNELS[type(spec)].reference


def machine_of(target: Target) -> Machine:
    """What kernels for a target are written for."""
    return cuda.select(target) if target.kind.name == "cuda" else isa.select(target)


def lower(spec: KernelSpec, target: Target, weight: NDArray[Any] | None = None) -> Kernel:
    """Choose and build the kernel for a specification.

    Parameters
    ----------
    spec : KernelSpec
        What to compute.
    target : tvm.target.Target
        Where; its CPU, or its CUDA architecture, decides on the instructions.
    weight : ndarray of int, optional
        The layer's weight, of shape ``spec.weight_shape``: where its values are smaller than its bits allow, the kernel may be
        a faster one, which then takes such weights only.

    Returns
    -------
    Kernel
        The function with what prepares its weight.  Equal specifications give the same object, unless weights differ too much.

    Raises
    ------
    CompileError
        If no kernel computes `spec`.
    """
    generator = _generator(spec, machine_of(target))
    return _kernel(generator if weight is None else generator.for_weight(weight))


@functools.lru_cache(maxsize=1024)
def _generator(spec: KernelSpec, machine: Machine) -> Generator[Any, Any]:
    entry = KERNELS.get(type(spec))
    for generator in entry.generators(machine) if entry else ():
        if generator.takes(spec, machine):
            return generator.make(spec, machine)
    raise CompileError(
        f"there is no kernel for {type(spec).__name__} on {machine.name}; see tvm_backend.kernels.registry"
    )


@functools.lru_cache(maxsize=1024)
def _kernel(generator: Generator[Any, Any]) -> Kernel:
    return Kernel.of(generator)
