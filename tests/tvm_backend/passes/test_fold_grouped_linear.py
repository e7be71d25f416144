"""The pass ``fold_grouped_linear``, before and after."""

from __future__ import annotations

import numpy as np
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from tests.tvm_backend.passes.tools import Q8, RNG, check, const, dequantize, kernel, per_channel, untouched
from tvm_backend import dialect
from tvm_backend.kernels.spec import Epilogue, GroupedLinearSpec, QParams, TokensSpec
from tvm_backend.passes.fold_grouped_linear import FoldGroupedLinear

TOKENS = TokensSpec(None, 8, 15)
OWN = QParams(1.0, 0, 0, 15, "uint8")
WEIGHT = RNG.integers(-8, 8, (3, 8)).astype("int8")
SCALES = RNG.uniform(0.01, 0.1, (3, 2)).astype("float32")
ROWS, ROW_SCALES, ROW_ZEROS = (
    const(WEIGHT.reshape(6, 4), "int8"),
    const(SCALES.ravel()),
    const(np.zeros(6), "int64"),
)
PLAIN, TURNED, ONE_EACH = const(WEIGHT, "int8"), const(WEIGHT.T.copy(), "int8"), const(SCALES[:, 0])
ZEROS, THREE_ZEROS = const(np.zeros(3)), const(np.zeros(3), "int64")
GROUPED, SINGLE = const(SCALES.T.copy()), const(SCALES[None, :, 0])
TENSOR = const((SCALES.T.astype("float64") * Q8.scale).astype("float32"))
AXIS0, AXIS1 = {"axis": 0, "qmin": -8, "qmax": 7}, {"axis": 1, "qmin": -8, "qmax": 7}


def spec(groups, tokens=True):
    return GroupedLinearSpec(None, 8, 3, OWN if tokens else Q8, Epilogue(), 4, groups, tokens)


def test_tokens_and_groups():
    both, channels = spec(2), spec(1)

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 8), "float32")):
            with R.dataflow():
                lv = kernel(TOKENS, x)
                lv1 = lv[0]
                lv2 = lv[1]
                lv3 = dialect.dequantize_rows(lv1, lv2)
                lv4 = per_channel(ROWS, ROW_SCALES, ROW_ZEROS, AXIS0)
                lv5 = R.reshape(lv4, R.shape([3, 8]))
                lv6 = R.permute_dims(lv5, axes=[1, 0])
                lv7 = R.matmul(lv3, lv6)
                lv8 = per_channel(TURNED, ONE_EACH, THREE_ZEROS, AXIS1)
                lv9 = R.matmul(lv3, lv8)
                gv = (lv7, lv9)
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 8), "float32")):
            with R.dataflow():
                lv = kernel(TOKENS, x)
                lv1 = lv[0]
                lv2 = lv[1]
                lv7 = kernel(both, lv1, PLAIN, GROUPED, ZEROS, lv2)
                lv9 = kernel(channels, lv1, PLAIN, SINGLE, ZEROS, lv2)
                gv = (lv7, lv9)
                R.output(gv)
            return gv

    check(FoldGroupedLinear, Before, After)


def test_groups_on_one_grid():
    grouped = spec(2, tokens=False)

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 5, 8), "uint8")):
            with R.dataflow():
                lv = dequantize(x, Q8)
                lv1 = per_channel(ROWS, ROW_SCALES, ROW_ZEROS, AXIS0)
                lv2 = R.reshape(lv1, R.shape([3, 8]))
                lv3 = R.permute_dims(lv2, axes=[1, 0])
                gv = R.matmul(lv, lv3)
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 5, 8), "uint8")):
            n = T.int64()
            with R.dataflow():
                lv = R.reshape(x, R.shape([n * 5, 8]))
                lv1 = kernel(grouped, lv, PLAIN, TENSOR, ZEROS)
                gv = R.reshape(lv1, R.shape([n, 5, 3]))
                R.output(gv)
            return gv

    check(FoldGroupedLinear, Before, After)


def test_activations_may_stay_float():
    floats = GroupedLinearSpec(None, 8, 3, QParams(1.0, 0, -128, 127, "int8"), Epilogue(), 4, 2, real=True)

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 8), "float32")):
            with R.dataflow():
                lv1 = per_channel(ROWS, ROW_SCALES, ROW_ZEROS, AXIS0)
                lv2 = R.reshape(lv1, R.shape([3, 8]))
                lv3 = R.permute_dims(lv2, axes=[1, 0])
                gv = R.matmul(x, lv3)
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 8), "float32")):
            with R.dataflow():
                gv = kernel(floats, x, PLAIN, GROUPED, ZEROS)
                R.output(gv)
            return gv

    check(FoldGroupedLinear, Before, After)


def test_weights_that_are_computed_are_left_alone():
    @I.ir_module
    class Module:
        @R.function
        def main(x: R.Tensor(("n", 8), "float32"), factor: R.Tensor((3, 8), "float32")):
            with R.dataflow():
                lv1 = per_channel(ROWS, ROW_SCALES, ROW_ZEROS, AXIS0)
                lv2 = R.reshape(lv1, R.shape([3, 8]))
                lv3 = R.multiply(lv2, factor)
                lv4 = R.permute_dims(lv3, axes=[1, 0])
                gv = R.matmul(x, lv4)
                R.output(gv)
            return gv

    untouched(FoldGroupedLinear, Module)
