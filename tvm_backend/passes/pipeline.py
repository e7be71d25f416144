"""The compiler's table of contents: every pass, in order."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from tvm_backend.passes.commute_quantization import HoistQuantize, SinkDequantize
from tvm_backend.passes.fold_bias import FoldBias
from tvm_backend.passes.fold_border import FoldBorder
from tvm_backend.passes.fold_concat import FoldConcat
from tvm_backend.passes.fold_constants import FoldConstants
from tvm_backend.passes.fold_convolution import FoldConvolution
from tvm_backend.passes.fold_elementwise import FoldElementwise
from tvm_backend.passes.fold_linear import FoldLinear
from tvm_backend.passes.fold_pooling import FoldPooling
from tvm_backend.passes.fold_subsample import FoldSubsample
from tvm_backend.passes.fuse_clip import FuseClip
from tvm_backend.passes.fuse_outputs import FuseOutputs
from tvm_backend.passes.fuse_residual import FuseResidual
from tvm_backend.passes.lower_kernels import lower_kernels
from tvm_backend.passes.propagate_layout import PropagateLayout

__all__ = ["integer_passes", "library_passes"]


def integer_passes(target: tvm.target.Target) -> list[Any]:
    """From the imported QDQ graph to calls of integer kernels."""
    return [
        # Bring quantize and dequantize next to the operators they belong to.
        FoldConstants,
        HoistQuantize,
        SinkDequantize,
        # Operators on integers.
        FoldConvolution,
        FoldLinear,
        FoldBias,
        FoldPooling,
        # Channels last between them.
        PropagateLayout,
        FoldSubsample,
        FoldConcat,
        # One epilogue for each kernel.
        FuseResidual,
        FoldElementwise,
        FuseClip,
        FuseOutputs,
        # What is left at the borders.
        FoldBorder,
        lower_kernels(target),
    ]


def library_passes(target: tvm.target.Target) -> Any:
    """From calls of kernels, and whatever is left in float, to what the virtual machine runs."""
    return relax.get_default_pipeline(target)
