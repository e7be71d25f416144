"""Each pass alone: TVMScript before and after, and graphs that it must leave as they are."""

from __future__ import annotations

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from tvm.script import ir as I  # noqa: E402
from tvm.script import relax as R  # noqa: E402

from tvm_backend import compat, dialect  # noqa: E402
from tvm_backend.kernels.spec import (  # noqa: E402
    ConvSpec,
    Epilogue,
    QParams,
)

quantize, dequantize, kernel = dialect.quantize, dialect.dequantize, dialect.kernel
per_channel = dialect.dequantize_per_channel

Q8 = QParams(0.05, 3, 0, 255, "uint8")
Q2 = QParams(0.5, 0, 0, 3, "uint8")
S8 = QParams(0.02, -4, -128, 127, "int8")
RNG = np.random.default_rng(0)


def const(array, dtype="float32"):
    return compat.constant(np.asarray(array, dtype))


def same(left, right):
    compat.assert_structural_equal(left, right)


W = RNG.integers(-8, 8, (6, 4, 3, 3)).astype("int8")
SCALES = RNG.uniform(0.01, 0.1, 6).astype("float32")
BIAS = RNG.normal(size=6).astype("float32")
WEIGHT, W_SCALES, W_ZEROS = const(W, "int8"), const(SCALES), const(np.zeros(6), "int64")
SCALE = const((SCALES.astype("float64") * Q8.scale).astype("float32"))
ZEROS, BIAS_CONST, BIAS_NCHW = const(np.zeros(6)), const(BIAS), const(BIAS.reshape(1, 6, 1, 1))
CHANNEL = {"axis": 0, "qmin": -8, "qmax": 7}
CONV = ConvSpec(None, 8, 8, 4, 6, (3, 3), Q8, Epilogue(), padding=(1, 1, 1, 1), weight_bits=4)
RELU = dialect.with_epilogue(CONV, clip=(0.0, None))


def test_fold_constants():
    from tvm_backend.passes.fold_constants import FoldConstants

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

    same(FoldConstants(Before), After)
    same(FoldConstants(After), After)
