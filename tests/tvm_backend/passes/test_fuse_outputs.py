"""The pass ``fuse_outputs``, before and after."""

from __future__ import annotations

from tvm.script import ir as I
from tvm.script import relax as R

from tests.tvm_backend.passes.tools import (
    BIAS_CONST,
    CONV,
    Q2,
    Q8,
    RELU,
    SCALE,
    WEIGHT,
    check,
    kernel,
    quantize,
)
from tvm_backend import dialect
from tvm_backend.passes.fuse_outputs import FuseOutputs


def test_fuse_outputs():
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8")):
            with R.dataflow():
                lv = kernel(RELU, x, WEIGHT, SCALE, BIAS_CONST)
                lv1 = quantize(lv, Q2)
                lv2 = quantize(lv, Q8)
                gv = (lv1, lv2)
                R.output(gv)
            return gv

    two = dialect.with_epilogue(RELU, outputs=(Q2, Q8))

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8")):
            with R.dataflow():
                lv = kernel(two, x, WEIGHT, SCALE, BIAS_CONST)
                lv1 = lv[0]
                lv2 = lv[1]
                gv = (lv1, lv2)
                R.output(gv)
            return gv

    check(FuseOutputs, Before, After)


def test_fuse_outputs_keeps_the_float_value_that_is_used():
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8")):
            with R.dataflow():
                lv = kernel(CONV, x, WEIGHT, SCALE, BIAS_CONST)
                lv1 = quantize(lv, Q2)
                lv2 = R.sigmoid(lv)
                gv = (lv1, lv2)
                R.output(gv)
            return gv

    two = dialect.with_epilogue(CONV, outputs=(Q2, "float32"))

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8")):
            with R.dataflow():
                lv = kernel(two, x, WEIGHT, SCALE, BIAS_CONST)
                lv1 = lv[0]
                lv2 = lv[1]
                lv3 = R.sigmoid(lv2)
                gv = (lv1, lv3)
                R.output(gv)
            return gv

    check(FuseOutputs, Before, After)
