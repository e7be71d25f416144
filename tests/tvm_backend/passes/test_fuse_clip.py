"""The pass ``fuse_clip``, before and after."""

from __future__ import annotations

from tvm.script import ir as I
from tvm.script import relax as R

from tests.tvm_backend.passes.tools import (
    BIAS_CONST,
    CONV,
    SCALE,
    WEIGHT,
    check,
    kernel,
    untouched,
)
from tvm_backend import dialect
from tvm_backend.passes.fuse_clip import FuseClip


def test_fuse_clip():
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8")):
            with R.dataflow():
                lv = kernel(CONV, x, WEIGHT, SCALE, BIAS_CONST)
                lv1 = R.nn.relu(lv)
                gv = R.clip(lv1, 0, 6)
                R.output(gv)
            return gv

    relu6 = dialect.with_epilogue(CONV, clip=(0.0, 6.0))

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8")):
            with R.dataflow():
                gv = kernel(relu6, x, WEIGHT, SCALE, BIAS_CONST)
                R.output(gv)
            return gv

    check(FuseClip, Before, After)

    @I.ir_module
    class UsedBefore:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8")):
            with R.dataflow():
                lv = kernel(CONV, x, WEIGHT, SCALE, BIAS_CONST)
                lv1 = R.nn.relu(lv)
                gv = (lv, lv1)
                R.output(gv)
            return gv

    untouched(FuseClip, UsedBefore)
