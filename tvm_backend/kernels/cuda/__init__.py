"""Integer kernels for CUDA: the same specifications and the same arithmetic as on a CPU."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

from cat_plugin.errors import CompileError
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

if TYPE_CHECKING:
    from tvm_backend.kernels.registry import Kernel

__all__ = ["capability", "lower"]


def capability(target: Any) -> int:
    """The compute capability of a CUDA target, 90 for ``sm_90``.

    Parameters
    ----------
    target : tvm.target.Target

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


def lower(spec: KernelSpec, target: Any) -> Kernel:
    """Choose and build the kernel for a specification.

    Parameters
    ----------
    spec : KernelSpec
        What to compute.
    target : tvm.target.Target
        A CUDA target with its architecture: mma from sm_80 on, dp4a from sm_61 on.

    Returns
    -------
    Kernel
        The function with what prepares its weight.
    """
    return _lower(spec, capability(target) >= 80)


@functools.lru_cache(maxsize=1024)
def _lower(spec: KernelSpec, tensor_cores: bool) -> Kernel:
    from tvm_backend.kernels.cuda import pointwise
    from tvm_backend.kernels.cuda.grouped import Grouped
    from tvm_backend.kernels.cuda.product import Product
    from tvm_backend.kernels.registry import Kernel, _moved

    generator: Any = None
    match spec:
        case ConvSpec() if spec.groups > 1:
            generator, kind, size = Grouped(spec), "grouped", spec.out_channels
        case ConvSpec():
            generator, kind, size = Product(spec, tensor_cores), "conv2d", spec.out_channels
        case LinearSpec():
            generator, kind, size = Product(spec, tensor_cores), "linear", spec.out_features
        case PoolSpec():
            function, kind, size = pointwise.pool(spec), f"{spec.kind}_pool", spec.channels
        case ElementwiseSpec():
            function, kind, size = pointwise.elementwise(spec), "add", spec.shape[-1]
        case ConcatSpec():
            function, kind, size = pointwise.concat(spec), "concat", sum(spec.channels)
        case SubsampleSpec():
            function, kind, size = pointwise.subsample(spec), "subsample", spec.channels
        case QuantizeSpec():
            function, kind, size = pointwise.quantize(spec), "quantize", spec.shape[-1]
        case DequantizeSpec():
            function, kind, size = pointwise.dequantize(spec), "dequantize", spec.shape[-1]
        case _:
            raise CompileError(f"there is no CUDA kernel for {type(spec).__name__}")
    macs, weight_bytes, variant = getattr(spec, "macs", None), 0, "cuda"
    if generator is not None:
        function = generator.build()
        weight_bytes = int(generator.arguments(1)[1][1][0])
        if isinstance(generator, Product):
            variant = "cuda_mma" if tensor_cores else "cuda_dp4a"
    moved = _moved(spec, weight_bytes)
    name = f"cuda_{kind}_{size}"
    return Kernel(
        name=name,
        variant=variant,
        spec=spec,
        prim_func=function.with_attr("global_symbol", name),
        operations=2 * macs if macs is not None else moved,
        bytes=moved,
        _pack=getattr(generator, "pack_weight", None),
        _stored_zero=getattr(generator, "stored_zero", 0),
    )
