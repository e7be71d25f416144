"""The pass ``fold_pooling``, before and after."""

from __future__ import annotations

import pytest
from tvm.script import ir as I
from tvm.script import relax as R

from tests.tvm_backend.passes.tools import (
    Q8,
    check,
    dequantize,
    kernel,
    untouched,
)
from tvm_backend.kernels.spec import (
    Epilogue,
    PoolSpec,
)
from tvm_backend.passes.fold_pooling import FoldPooling


@pytest.mark.parametrize("operator", ["mean", "adaptive", "avg"])
def test_fold_pooling(operator):
    spec = PoolSpec("avg", None, 8, 8, 4, (8, 8), (8, 8), Q8, Epilogue())
    pool = {
        "mean": lambda x: R.mean(x, axis=[-1, -2], keepdims=True),
        "adaptive": lambda x: R.nn.adaptive_avg_pool2d(x, (1, 1)),
        "avg": lambda x: R.nn.avg_pool2d(x, (8, 8), (8, 8), count_include_pad=True),
    }[operator]

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 4, 8, 8), "uint8")):
            with R.dataflow():
                lv = dequantize(x, Q8)
                gv = pool(lv)
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 4, 8, 8), "uint8")):
            with R.dataflow():
                lv = R.permute_dims(x, [0, 2, 3, 1])
                lv1 = kernel(spec, lv)
                gv = R.permute_dims(lv1, [0, 3, 1, 2])
                R.output(gv)
            return gv

    check(FoldPooling, Before, After)


def test_fold_pooling_leaves_a_mean_over_channels():
    @I.ir_module
    class Module:
        @R.function
        def main(x: R.Tensor(("n", 4, 8, 8), "uint8")):
            with R.dataflow():
                lv = dequantize(x, Q8)
                gv = R.mean(lv, axis=[1], keepdims=True)
                R.output(gv)
            return gv

    untouched(FoldPooling, Module)
