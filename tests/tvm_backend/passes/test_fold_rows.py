"""The pass ``fold_rows``, before and after."""

from __future__ import annotations

import numpy as np
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


def test_an_rms_norm_that_is_spelled_out():
    gamma = const(np.arange(8))

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 3, 8), "float32"), y: R.Tensor(("n", 8), "float32")):
            with R.dataflow():
                lv = R.power(x, R.const(2, "float32"))
                lv1 = R.mean(lv, axis=[2], keepdims=True)
                lv2 = R.add(lv1, R.const(0.5, "float32"))
                lv3 = R.rsqrt(lv2)
                lv4 = R.multiply(x, lv3)
                lv5 = R.multiply(gamma, lv4)
                lv6 = R.multiply(y, y)
                lv7 = R.mean(lv6, axis=[-1], keepdims=True)
                lv8 = R.sqrt(lv7)
                lv9 = R.divide(y, lv8)
                gv = (lv5, lv9)
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 3, 8), "float32"), y: R.Tensor(("n", 8), "float32")):
            n = T.int64()
            with R.dataflow():
                lv = R.reshape(x, R.shape([n * 3, 8]))
                lv1 = kernel(spec("rms_norm", 0.5), lv, gamma)
                lv2 = R.reshape(lv1, R.shape([n, 3, 8]))
                lv3 = kernel(spec("rms_norm"), y, ONES)
                gv = (lv2, lv3)
                R.output(gv)
            return gv

    check(FoldRows, Before, After)


def test_what_is_no_rms_norm():
    @I.ir_module
    class Module:
        @R.function
        def main(x: R.Tensor(("n", 8), "float32"), y: R.Tensor(("n", 8), "float32")):
            with R.dataflow():
                lv = R.multiply(x, x)
                lv1 = R.mean(lv, axis=[-1], keepdims=True)
                lv2 = R.rsqrt(lv1)
                lv3 = R.multiply(y, lv2)  # the squares of something else
                lv4 = R.power(x, R.const(3, "float32"))
                lv5 = R.mean(lv4, axis=[-1], keepdims=True)
                lv6 = R.rsqrt(lv5)
                lv7 = R.multiply(x, lv6)  # no squares
                lv8 = R.mean(lv, axis=[0], keepdims=True)
                lv9 = R.rsqrt(lv8)
                lv10 = R.multiply(x, lv9)  # not along rows
                gv = (lv3, lv7, lv10)
                R.output(gv)
            return gv

    untouched(FoldRows, Module)


def test_fold_rows_declines():
    @I.ir_module
    class Module:
        @R.function
        def main(x: R.Tensor(("n", 3, 8), "float32"), y: R.Tensor(("n", "m"), "float32")):
            with R.dataflow():
                lv = R.nn.softmax(x, axis=1)  # not along rows
                lv1 = R.nn.softmax(y, axis=-1)  # of unknown length
                lv2 = R.nn.gelu(x)  # a pass over what is multiplied next does both
                lv3 = R.multiply(lv2, ONES)
                gv = (lv, lv1, lv3)
                R.output(gv)
            return gv

    untouched(FoldRows, Module)
