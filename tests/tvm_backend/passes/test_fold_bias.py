"""The pass ``fold_bias``, before and after."""

from __future__ import annotations

from tvm.script import ir as I
from tvm.script import relax as R

from tests.tvm_backend.passes.tools import (
    BIAS_CONST,
    BIAS_NCHW,
    CONV,
    SCALE,
    WEIGHT,
    ZEROS,
    check,
    kernel,
    untouched,
)
from tvm_backend.passes.fold_bias import FoldBias


def test_fold_bias():
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8")):
            with R.dataflow():
                lv = kernel(CONV, x, WEIGHT, SCALE, ZEROS)
                lv1 = R.permute_dims(lv, [0, 3, 1, 2])
                gv = R.add(lv1, BIAS_NCHW)
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8")):
            with R.dataflow():
                lv = kernel(CONV, x, WEIGHT, SCALE, BIAS_CONST)
                gv = R.permute_dims(lv, [0, 3, 1, 2])
                R.output(gv)
            return gv

    check(FoldBias, Before, After)

    @I.ir_module
    class UsedTwice:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8")):
            with R.dataflow():
                lv = kernel(CONV, x, WEIGHT, SCALE, ZEROS)
                lv1 = R.permute_dims(lv, [0, 3, 1, 2])
                lv2 = R.add(lv1, BIAS_NCHW)
                gv = R.add(lv2, lv1)
                R.output(gv)
            return gv

    untouched(FoldBias, UsedTwice)
