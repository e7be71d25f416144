"""The pass ``fold_constants``, before and after."""

from __future__ import annotations

from tvm.script import ir as I
from tvm.script import relax as R

from tests.tvm_backend.passes.tools import (
    BIAS_CONST,
    BIAS_NCHW,
    check,
)
from tvm_backend.passes.fold_constants import FoldConstants


def test_fold_constants():
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((1, 6, 8, 8), "float32")):
            with R.dataflow():
                lv = R.reshape(BIAS_CONST, R.shape([1, 6, 1, 1]))
                gv = R.add(x, lv)
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor((1, 6, 8, 8), "float32")):
            with R.dataflow():
                gv = R.add(x, BIAS_NCHW)
                R.output(gv)
            return gv

    check(FoldConstants, Before, After)
