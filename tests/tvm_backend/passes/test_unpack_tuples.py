"""The pass ``unpack_tuples``, before and after."""

from __future__ import annotations

from tvm.script import ir as I
from tvm.script import relax as R

from tests.tvm_backend.passes.tools import (
    check,
)
from tvm_backend.passes.unpack_tuples import UnpackTuples


def test_unpack_tuples():
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((1, 6, 8, 8), "float32")):
            with R.dataflow():
                lv = R.nn.max_pool2d(x, (2, 2), (2, 2))
                lv1 = R.zeros_like(lv)
                lv2 = (lv, lv1)
                lv3 = lv2[0]
                gv = R.nn.relu(lv3)
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor((1, 6, 8, 8), "float32")):
            with R.dataflow():
                lv = R.nn.max_pool2d(x, (2, 2), (2, 2))
                gv = R.nn.relu(lv)
                R.output(gv)
            return gv

    check(UnpackTuples, Before, After)
