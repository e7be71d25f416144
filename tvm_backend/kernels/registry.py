"""From a specification and a target to a kernel."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.target import Target

from cat_plugin.errors import CompileError
from tvm_backend.kernels.cpu import packing
from tvm_backend.kernels.cpu.border import Dequantize, Quantize
from tvm_backend.kernels.cpu.concat import Concat
from tvm_backend.kernels.cpu.conv2d import DirectConv
from tvm_backend.kernels.cpu.conv2d_amx import AmxConv
from tvm_backend.kernels.cpu.depthwise import Depthwise
from tvm_backend.kernels.cpu.depthwise_dot import DepthwiseDot
from tvm_backend.kernels.cpu.elementwise import Elementwise
from tvm_backend.kernels.cpu.isa import Amx, InstructionSet, select
from tvm_backend.kernels.cpu.linear import Linear
from tvm_backend.kernels.cpu.linear_amx import AmxLinear
from tvm_backend.kernels.cpu.pool import Pool
from tvm_backend.kernels.cpu.subsample import Subsample
from tvm_backend.kernels.cpu.weighted import Weighted
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

__all__ = ["Kernel", "lower", "of_generator"]


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel that is ready to be added to a module.

    Parameters
    ----------
    name : str
        Name that says what it computes; not unique.
    variant : str
        Instruction set and algorithm, for the report.
    spec : KernelSpec
        What it computes.
    prim_func : tvm.tirx.PrimFunc
        The function; its arguments are those that the specification's docstring lists, in that order.
    operations : int
        Multiplications and additions for one sample; for kernels without a weight, elements produced.
    bytes : int
        Bytes of inputs and outputs for one sample, plus the packed weight once.
    unpacking : str
        Where weights below 8 bits become bytes; empty where the kernel reads bytes.
    """

    name: str
    variant: str
    spec: KernelSpec
    prim_func: Any
    operations: int
    bytes: int
    unpacking: str = ""
    _pack: Callable[[NDArray[Any]], NDArray[Any]] | None = None
    _stored_zero: int = 0

    def pack_weight(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Bring integer weights into the order in which the kernel reads them.

        Parameters
        ----------
        weight : ndarray of int
            Shape ``spec.weight_shape``, zero point already subtracted.

        Returns
        -------
        ndarray of int8 or uint8, one-dimensional
            The packed weight, at 2, 4 or 8 bits a value.

        Raises
        ------
        CompileError
            If the kernel has no weight, or the weight does not fit into its bits.
        """
        if self._pack is None:
            raise CompileError(f"{self.name} has no weight to pack")
        return self._pack(np.asarray(weight))

    def compensation(self, weight: NDArray[Any]) -> NDArray[np.int32]:
        """The int32 argument that takes the zero point out of the sums.

        It is ``-zero_point * sum(weight)`` for each output channel, with the zero point as the kernel's instructions
        see it: where int8 activations are multiplied as uint8, that is 128 more.  `weight` is unpacked.
        """
        return packing.zero_point_sums(np.asarray(weight), self._stored_zero)


def _size(kind: Any) -> int:
    return 1 if kind != "float32" else 4


def _moved(spec: KernelSpec, weight_bytes: int) -> int:
    """Bytes of inputs and outputs for one sample, and of the weight."""
    match spec:
        case ConvSpec() | LinearSpec():
            out, into = math.prod(spec.out_shape), math.prod(spec.in_shape)
        case PoolSpec():
            out = spec.out_height * spec.out_width * spec.channels
            into = spec.height * spec.width * spec.channels
        case ElementwiseSpec():
            out = math.prod(spec.shape)
            into = out * sum(_size(kind) for kind in spec.inputs)
        case ConcatSpec():
            out = into = math.prod(spec.shape) * sum(spec.channels)
        case SubsampleSpec():
            out = into = math.prod(spec.out_shape)
            return out + into
        case QuantizeSpec():
            out = math.prod(spec.shape)
            return out * (4 + len(spec.outputs))
        case DequantizeSpec():
            return math.prod(spec.shape) * 5
    total = into + weight_bytes + out * sum(_size(kind) for kind in spec.epilogue.outputs)
    if spec.epilogue.residual is not None:
        total += out * _size(spec.epilogue.residual)
    return total


def _for_values(spec: ConvSpec | LinearSpec, isa: InstructionSet) -> InstructionSet:
    """The instruction set for the values that a layer multiplies."""
    stored = spec.input if spec.input.dtype == "uint8" else spec.input.flipped
    bits = packing.storage_bits(spec.weight_bits)
    return isa.for_values(max(stored.qmax, stored.zero_point), (1 << bits) - 1 if bits < 8 else 128)


def _generator(spec: KernelSpec, isa: InstructionSet) -> tuple[str, Any]:
    """The kernel's name and the generator for a specification."""
    tiles, isa = (isa if isinstance(isa, Amx) else None), isa.vector
    match spec:
        case ConvSpec() if spec.depthwise and spec.in_channels > 1:
            name = f"depthwise_{spec.kernel[0]}x{spec.kernel[1]}_{spec.in_channels}"
            dot = DepthwiseDot.takes(spec, isa)
            return name, (DepthwiseDot if dot else Depthwise)(spec, isa)
        case ConvSpec():
            name = f"conv2d_{spec.kernel[0]}x{spec.kernel[1]}_{spec.in_channels}_{spec.out_channels}"
            if tiles and AmxConv.takes(spec, tiles):
                return name, AmxConv(spec, tiles)
            return name, DirectConv(spec, _for_values(spec, isa))
        case LinearSpec():
            name = f"linear_{spec.in_features}_{spec.out_features}"
            if tiles and AmxLinear.takes(spec, tiles):
                return name, AmxLinear(spec, tiles)
            return name, Linear(spec, _for_values(spec, isa))
        case PoolSpec():
            return f"{spec.kind}_pool_{spec.kernel[0]}x{spec.kernel[1]}_{spec.channels}", Pool(spec, isa)
        case ElementwiseSpec():
            return ("requantize" if len(spec.inputs) == 1 else "add"), Elementwise(spec, isa)
        case ConcatSpec():
            return "concat", Concat(spec, isa)
        case SubsampleSpec():
            return "subsample", Subsample(spec, isa)
        case QuantizeSpec():
            return "quantize", Quantize(spec, isa)
        case DequantizeSpec():
            return "dequantize", Dequantize(spec, isa)
    raise CompileError(f"there is no kernel for {type(spec).__name__}; see tvm_backend.kernels.spec")


def lower(spec: KernelSpec, target: Target) -> Kernel:
    """Choose and build the kernel for a specification.

    Parameters
    ----------
    spec : KernelSpec
        What to compute.
    target : tvm.target.Target
        Where; its CPU decides on the instructions.

    Returns
    -------
    Kernel
        The function with what prepares its weight.  Equal arguments give the same object.

    Raises
    ------
    CompileError
        If no kernel computes `spec`.
    """
    if target.kind.name == "cuda":
        from tvm_backend.kernels import cuda

        return cuda.lower(spec, target)
    return _lower(spec, select(target))


@functools.lru_cache(maxsize=1024)
def _lower(spec: KernelSpec, isa: InstructionSet) -> Kernel:
    name, generator = _generator(spec, isa)
    return of_generator(generator, name)


def of_generator(generator: Any, name: str) -> Kernel:
    """The kernel that a generator makes, under the name it is given."""
    spec = generator.spec
    macs = getattr(spec, "macs", None)
    weighted = generator if isinstance(generator, Weighted) else None
    moved = _moved(spec, weighted.weight_length if weighted else 0)
    return Kernel(
        name=name,
        variant=generator.isa.name,
        spec=spec,
        prim_func=generator.build(name),
        operations=2 * macs if macs is not None else moved,
        bytes=moved,
        unpacking=weighted.unpacking if weighted else "",
        _pack=getattr(generator, "pack_weight", None),
        _stored_zero=getattr(generator, "stored_zero", 0),
    )
