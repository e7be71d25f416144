"""The pass ``fold_rows``, before and after."""

from __future__ import annotations

from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from tests.tvm_backend.passes.tools import check, const, kernel, untouched
from tvm_backend.kernels.spec import Epilogue, RowsSpec
from tvm_backend.passes.fold_rows import FoldRows

ONES = const([1.0] * 8)


def spec(function, epsilon=0.0):
    return RowsSpec(None, 8, function, Epilogue(), epsilon)


def test_fold_rows():
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 3, 8), "float32")):
            with R.dataflow():
                lv = R.nn.softmax(x, axis=-1)
                lv1 = R.nn.layer_norm(lv, ONES, ONES, axes=[-1], epsilon=1e-6)
                gv = R.nn.gelu(lv1)
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 3, 8), "float32")):
            n = T.int64()
            with R.dataflow():
                lv = R.reshape(x, R.shape([n * 3, 8]))
                lv1 = kernel(spec("softmax"), lv)
                lv2 = R.reshape(lv1, R.shape([n, 3, 8]))
                lv3 = R.reshape(lv2, R.shape([n * 3, 8]))
                lv4 = kernel(spec("layer_norm", 1e-6), lv3, ONES, ONES)
                lv5 = R.reshape(lv4, R.shape([n, 3, 8]))
                lv6 = R.reshape(lv5, R.shape([n * 3, 8]))
                lv7 = kernel(spec("gelu"), lv6)
                gv = R.reshape(lv7, R.shape([n, 3, 8]))
                R.output(gv)
            return gv

    check(FoldRows, Before, After)


def test_fold_rows_declines():
    @I.ir_module
    class Module:
        @R.function
        def main(x: R.Tensor(("n", 3, 8), "float32"), y: R.Tensor(("n", "m"), "float32")):
            with R.dataflow():
                lv = R.nn.softmax(x, axis=1)  # not along rows
                lv1 = R.nn.softmax(y, axis=-1)  # of unknown length
                gv = (lv, lv1)
                R.output(gv)
            return gv

    untouched(FoldRows, Module)
