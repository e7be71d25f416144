"""TVM's passes from a kernel's loops to what LLVM takes, without those that find nothing in them.

TVM runs some fifty passes, most of them for schedules, devices and asynchronous copies; a kernel for processors is written as it
is to be, so they change nothing in it, and on long bodies they take longer than LLVM.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.s_tir import pipeline as whole

__all__ = ["pipeline_for"]

_NAME = "cat_ptq_kernels"


def _passes() -> list[tvm.transform.Pass]:
    scheduled, plain = s_tir.transform, tirx.transform
    return [
        scheduled.CompactBufferAllocation(),
        scheduled.StmtSimplify(),
        scheduled.LowerOpaqueBlock(),
        plain.FlattenBuffer(),
        plain.BF16ComputeLegalize(),
        plain.VectorizeLoop(True),
        plain.StorageRewrite(),
        scheduled.HoistIfThenElse(),
        plain.UnrollLoop(),
        scheduled.RenormalizeSplitPattern(),
        plain.StmtSimplify(),
        scheduled.RewriteUnsafeSelect(),
        plain.CommonSubexprElim(),
        plain.VerifyMemory(),
        plain.AnnotateEntryFunc(),
        plain.SplitHostDevice(),
        plain.MakePackedAPI(),
        plain.BF16StorageLegalize(),
    ]


def _pipeline() -> tuple[tvm.transform.Pass, Any, Any]:
    def run(mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        return tvm.transform.Sequential(_passes())(mod)

    passes = tvm.transform.module_pass(run, opt_level=0, name="Kernels")
    return passes, whole.finalize_host_passes, whole.finalize_device_passes


tirx.register_tir_pipeline(_NAME, _pipeline)


def pipeline_for(function: tirx.PrimFunc) -> str:
    """The name of the pipeline that ``tvm.tirx.build`` takes a function through: all of TVM's where it is scheduled by TVM."""
    return "default" if function.attrs.get("s_tir") else _NAME
