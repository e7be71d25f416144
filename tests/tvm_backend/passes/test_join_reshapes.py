"""The pass ``join_reshapes``, before and after."""

from __future__ import annotations

from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from tests.tvm_backend.passes.tools import check
from tvm_backend.passes.join_reshapes import JoinReshapes


def test_join_reshapes():
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 3, 8), "float32")):
            n = T.int64()
            with R.dataflow():
                lv = R.reshape(x, R.shape([n * 3, 8]))
                lv1 = R.sigmoid(lv)
                lv2 = R.reshape(lv1, R.shape([n, 3, 8]))
                lv3 = R.reshape(lv2, R.shape([n * 3, 8]))
                lv4 = R.sigmoid(lv3)
                lv5 = R.reshape(lv4, R.shape([n, 3, 8]))
                lv6 = R.reshape(lv5, R.shape([n, 24]))
                lv7 = R.reshape(lv6, R.shape([n, 2, 12]))
                lv8 = R.add(lv2, lv5)
                gv = (lv7, lv8)
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 3, 8), "float32")):
            n = T.int64()
            with R.dataflow():
                lv = R.reshape(x, R.shape([n * 3, 8]))
                lv1 = R.sigmoid(lv)
                lv2 = R.reshape(lv1, R.shape([n, 3, 8]))
                lv4 = R.sigmoid(lv1)
                lv5 = R.reshape(lv4, R.shape([n, 3, 8]))
                lv7 = R.reshape(lv4, R.shape([n, 2, 12]))
                lv8 = R.add(lv2, lv5)
                gv = (lv7, lv8)
                R.output(gv)
            return gv

    check(JoinReshapes, Before, After)
