"""What a kernel computes, written down as data.

A specification says everything that the arithmetic of an integer kernel depends on: shapes, quantization
parameters, activation, further inputs and outputs.  It is frozen and hashable, so that equal layers share a
kernel, and checks itself, so that a kernel never sees what it cannot compute.

All kernels use the same arithmetic, and equal their reference to the bit:

- activations are stored in 8 bits, channels last; a real value is ``(q - zero_point) * scale``;
- weights are integers with their zero point already subtracted;
- products are summed exactly in int32: ``acc = sum((q - zero_point) * w)``;
- the epilogue is float32: ``v = fma(float32(acc), scale[c], bias[c])``; a branch quantizes ``v`` as an integer output is
  and makes it ``float32(q - zero_point) * scale`` again; a residual ``r`` that is an integer tensor
  adds ``fma(float32(r - zero_point), scale, v)``, one that is float32 adds plainly; ``v`` is clipped;
- an integer output is ``clamp(rint(v * float32(1 / scale)) + zero_point, qmin, qmax)`` with ties to even, which is
  ``torch.ops.quantized_decomposed.quantize_per_tensor``; a quantize kernel makes 0 of NaN, as the conversion of a NaN to an
  integer does in PyTorch, and infinities are clipped.
"""

from __future__ import annotations

from tvm_backend.kernels.spec.base import Argument, EpilogueSpec, KernelSpec, Operand, WeightedSpec
from tvm_backend.kernels.spec.layers import ConvSpec, LinearSpec
from tvm_backend.kernels.spec.pooling import PoolSpec
from tvm_backend.kernels.spec.products import ProductSpec
from tvm_backend.kernels.spec.rotations import RotationSpec
from tvm_backend.kernels.spec.rows import RowsSpec
from tvm_backend.kernels.spec.tensors import (
    ConcatSpec,
    DequantizeSpec,
    ElementwiseSpec,
    QuantizeSpec,
    SubsampleSpec,
)
from tvm_backend.kernels.spec.tokens import LEAST_SCALE, GroupedLinearSpec, TokensSpec
from tvm_backend.kernels.spec.values import Epilogue, QParams, TensorKind, storage_dtype

__all__ = [
    "LEAST_SCALE",
    "Argument",
    "ConcatSpec",
    "ConvSpec",
    "DequantizeSpec",
    "ElementwiseSpec",
    "Epilogue",
    "EpilogueSpec",
    "GroupedLinearSpec",
    "KernelSpec",
    "LinearSpec",
    "Operand",
    "PoolSpec",
    "ProductSpec",
    "QParams",
    "QuantizeSpec",
    "RotationSpec",
    "RowsSpec",
    "SubsampleSpec",
    "TensorKind",
    "TokensSpec",
    "WeightedSpec",
    "storage_dtype",
]
