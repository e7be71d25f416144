"""The pass ``fuse_residual``, before and after."""

from __future__ import annotations

from tvm.script import ir as I
from tvm.script import relax as R

from tests.tvm_backend.passes.tools import (
    BIAS_CONST,
    CONV,
    Q8,
    S8,
    SCALE,
    WEIGHT,
    check,
    dequantize,
    kernel,
    quantize,
    untouched,
)
from tvm_backend import dialect
from tvm_backend.passes.fuse_residual import FuseResidual


def test_fuse_residual():
    spec = dialect.with_epilogue(CONV, residual=S8)

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8"), y: R.Tensor(("n", 8, 8, 6), "int8")):
            with R.dataflow():
                lv = kernel(CONV, x, WEIGHT, SCALE, BIAS_CONST)
                lv1 = dequantize(y, S8)
                gv = R.add(lv, lv1)
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8"), y: R.Tensor(("n", 8, 8, 6), "int8")):
            with R.dataflow():
                gv = kernel(spec, x, WEIGHT, SCALE, BIAS_CONST, y)
                R.output(gv)
            return gv

    check(FuseResidual, Before, After)


def test_fuse_residual_with_its_branch():
    spec = dialect.with_epilogue(CONV, residual=S8, branch=Q8)

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8"), y: R.Tensor(("n", 8, 8, 6), "int8")):
            with R.dataflow():
                lv = kernel(CONV, x, WEIGHT, SCALE, BIAS_CONST)
                lv1 = quantize(lv, Q8)
                lv2 = dequantize(lv1, Q8)
                lv3 = dequantize(y, S8)
                gv = R.add(lv2, lv3)
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8"), y: R.Tensor(("n", 8, 8, 6), "int8")):
            with R.dataflow():
                gv = kernel(spec, x, WEIGHT, SCALE, BIAS_CONST, y)
                R.output(gv)
            return gv

    check(FuseResidual, Before, After)

    @I.ir_module
    class Shared:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8"), y: R.Tensor(("n", 8, 8, 6), "int8")):
            with R.dataflow():
                lv = kernel(CONV, x, WEIGHT, SCALE, BIAS_CONST)
                lv1 = quantize(lv, Q8)
                lv2 = dequantize(lv1, Q8)
                lv3 = dequantize(y, S8)
                lv4 = R.add(lv2, lv3)
                gv = (lv4, lv1)
                R.output(gv)
            return gv

    untouched(FuseResidual, Shared)
