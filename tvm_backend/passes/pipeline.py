"""The compiler's table of contents: every pass, in order."""

from __future__ import annotations

import tvm
from tvm import relax

from tvm_backend import compat
from tvm_backend.kernels import cuda
from tvm_backend.passes.bound_outputs import BoundOutputs
from tvm_backend.passes.commute_quantization import HoistQuantize, SinkDequantize
from tvm_backend.passes.drop_broadcasts import DropBroadcasts
from tvm_backend.passes.dump import Dump
from tvm_backend.passes.fold_bias import FoldBias
from tvm_backend.passes.fold_border import FoldBorder
from tvm_backend.passes.fold_concat import FoldConcat
from tvm_backend.passes.fold_constants import FoldConstants
from tvm_backend.passes.fold_convolution import FoldConvolution
from tvm_backend.passes.fold_elementwise import FoldElementwise
from tvm_backend.passes.fold_grouped_linear import FoldGroupedLinear
from tvm_backend.passes.fold_linear import FoldLinear
from tvm_backend.passes.fold_pooling import FoldPooling
from tvm_backend.passes.fold_product import FoldIntegerProduct, FoldProduct
from tvm_backend.passes.fold_rotation import FoldRotation
from tvm_backend.passes.fold_rows import FoldRows
from tvm_backend.passes.fold_subsample import FoldSubsample
from tvm_backend.passes.fold_tokens import FoldTokens
from tvm_backend.passes.fuse_clip import FuseClip
from tvm_backend.passes.fuse_outputs import FuseOutputs
from tvm_backend.passes.fuse_quantize import FuseQuantize
from tvm_backend.passes.fuse_residual import FuseResidual
from tvm_backend.passes.join_reshapes import JoinReshapes
from tvm_backend.passes.legalize_float import FUNCTIONS
from tvm_backend.passes.lower_kernels import LowerKernels
from tvm_backend.passes.propagate_layout import PropagateLayout
from tvm_backend.passes.schedule_loops import ScheduleLoops
from tvm_backend.passes.unfold_border import UnfoldBorder
from tvm_backend.passes.unpack_tuples import UnpackTuples
from tvm_backend.target import is_cuda

__all__ = ["CUDA_PASSES", "INTEGER_PASSES", "PROCESSOR_PASSES", "integer_kernels", "library_passes"]

INTEGER_PASSES: tuple[tvm.transform.Pass, ...] = (
    # Bring quantize and dequantize next to the operators they belong to.
    UnpackTuples,
    DropBroadcasts,
    FoldConstants,
    HoistQuantize,
    SinkDequantize,
    FoldConstants,
    # Operators on integers.
    FoldConvolution,
    FoldTokens,
    FoldLinear,
    FoldGroupedLinear,
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
    # What the weights say of the values.
    BoundOutputs,
)
"""From the imported QDQ graph to symbolic kernels."""

PROCESSOR_PASSES: tuple[tvm.transform.Pass, ...] = (
    FoldRotation,
    FoldProduct,
    FoldRows,
    JoinReshapes,
    FuseQuantize,
    UnfoldBorder,
)
"""Rotations, products, functions of rows and the borders of what is left in float, for a processor."""

CUDA_PASSES: tuple[tvm.transform.Pass, ...] = (
    FoldRows,
    JoinReshapes,
    FuseQuantize,
    UnfoldBorder,
)
"""The same for a CUDA device, which leaves products of float32 to TVM; with tensor cores, products of integers come before."""


def integer_kernels(mod: tvm.IRModule, dump: Dump | None = None, processor: bool = True) -> tvm.IRModule:
    """Run :data:`INTEGER_PASSES`.

    Parameters
    ----------
    mod : tvm.IRModule
        The imported graph.
    dump : Dump, optional
        Takes the module as it comes and after each pass.
    processor : bool, optional
        Whether it is for a processor, which has kernels for scales finer than channels and tensors; a CUDA device has none.

    Returns
    -------
    tvm.IRModule
        The graph in symbolic kernels.
    """
    if dump is not None:
        dump.write(mod, "Imported")
    for step in INTEGER_PASSES:
        if not processor and step in (FoldTokens, FoldGroupedLinear):
            continue
        with compat.BUILDERS:
            mod = step(mod)
        if dump is not None:
            dump.write(mod, str(step.info.name))
    return mod


def _around_float(target: tvm.target.Target) -> list[tvm.transform.Pass]:
    """The passes that a target has kernels for."""
    if not is_cuda(target):
        return list(PROCESSOR_PASSES)
    return [
        *([FoldIntegerProduct] if isinstance(cuda.select(target), cuda.TensorCores) else []),
        *CUDA_PASSES,
    ]


def _float_schedules() -> tvm.transform.Pass:
    """TVM's schedules for what is left in float on a CUDA device: tiles for products, a thread for each element of anything else."""
    from tvm.s_tir import dlight

    gpu = dlight.gpu
    return dlight.ApplyDefaultSchedule(gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.Fallback())


def library_passes(
    target: tvm.target.Target, lower: LowerKernels, schedules: ScheduleLoops, dump: Dump | None = None
) -> tvm.transform.Pass:
    """From symbolic kernels, and whatever is left in float, to what the virtual machine runs.

    Parameters
    ----------
    target : tvm.target.Target
        The target.
    lower : LowerKernels
        The pass that puts the kernels in; it knows them afterwards.
    schedules : ScheduleLoops
        The pass that schedules what is left in float on a processor; it knows afterwards what that was.
    dump : Dump, optional
        Takes the module after each pass.

    Returns
    -------
    tvm.transform.Pass
        A pipeline for ``tvm.compile``.
    """
    transform = relax.transform
    steps = [
        *_around_float(target),
        relax.backend.DispatchSampling(),
        relax.backend.DispatchSortScan(),
        # Operators left in float: TVM's own functions, fused among themselves.
        transform.LegalizeOps({} if is_cuda(target) else FUNCTIONS),
        transform.AnnotateTIROpPattern(),
        transform.FoldConstant(),
        transform.FuseOps(),
        transform.FuseTIR(),
        transform.RewriteDataflowReshape(),
        _float_schedules() if is_cuda(target) else schedules.pass_,
        # The kernels come after TVM's fusion, which does not understand their loops.
        lower.pass_,
        transform.ToNonDataflow(),
        transform.RemovePurityChecking(),
        transform.CallTIRRewrite(),
        transform.StaticPlanBlockMemory(),
        # Functions for one batch size launch their kernels as one graph.
        *([transform.RewriteCUDAGraph()] if is_cuda(target) else []),
        transform.LowerAllocTensor(),
        transform.KillAfterLastUse(),
        transform.LowerRuntimeBuiltin(),
        transform.ComputePrimValue(),
        transform.VMShapeLower(),
        transform.AttachGlobalSymbol(),
    ]

    if dump is not None:
        steps = [each for step in steps for each in (step, dump.after(step))]

    def pipeline(mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        context = tvm.transform.PassContext(config={"relax.backend.use_cuda_graph": True})
        with compat.BUILDERS, target, context:
            return tvm.transform.Sequential(steps)(mod)

    return tvm.transform.module_pass(pipeline, opt_level=0, name="LibraryPasses")
