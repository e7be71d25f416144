"""The pass ``fold_convolution``, before and after."""

from __future__ import annotations

from tvm.script import ir as I
from tvm.script import relax as R

from tests.tvm_backend.passes.tools import (
    CHANNEL,
    CONV,
    Q8,
    SCALE,
    W_SCALES,
    W_ZEROS,
    WEIGHT,
    ZEROS,
    check,
    dequantize,
    kernel,
    per_channel,
    untouched,
)
from tvm_backend.kernels.spec import (
    ConvSpec,
    Epilogue,
)
from tvm_backend.passes.fold_convolution import FoldConvolution


def test_fold_convolution():
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 4, 8, 8), "uint8")):
            with R.dataflow():
                lv = dequantize(x, Q8)
                lv1 = per_channel(WEIGHT, W_SCALES, W_ZEROS, CHANNEL)
                gv = R.nn.conv2d(lv, lv1, padding=(1, 1))
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 4, 8, 8), "uint8")):
            with R.dataflow():
                lv = R.permute_dims(x, [0, 2, 3, 1])
                lv1 = kernel(CONV, lv, WEIGHT, SCALE, ZEROS)
                gv = R.permute_dims(lv1, [0, 3, 1, 2])
                R.output(gv)
            return gv

    check(FoldConvolution, Before, After)

    @I.ir_module
    class FloatInput:
        @R.function
        def main(x: R.Tensor(("n", 4, 8, 8), "float32")):
            with R.dataflow():
                lv1 = per_channel(WEIGHT, W_SCALES, W_ZEROS, CHANNEL)
                gv = R.nn.conv2d(x, lv1, padding=(1, 1))
                R.output(gv)
            return gv

    untouched(FoldConvolution, FloatInput)


def test_fold_convolution_takes_the_padding_in_front():
    spec = ConvSpec(2, 8, 8, 4, 6, (3, 3), Q8, Epilogue(), (2, 2), (0, 0, 1, 1), weight_bits=4)

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((2, 4, 8, 8), "uint8")):
            with R.dataflow():
                lv = R.nn.pad(x, (0, 0, 0, 0, 0, 1, 0, 1), "constant", 3.0)
                lv1 = dequantize(lv, Q8)
                lv2 = per_channel(WEIGHT, W_SCALES, W_ZEROS, CHANNEL)
                gv = R.nn.conv2d(lv1, lv2, strides=(2, 2))
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor((2, 4, 8, 8), "uint8")):
            with R.dataflow():
                lv = R.permute_dims(x, [0, 2, 3, 1])
                lv1 = kernel(spec, lv, WEIGHT, SCALE, ZEROS)
                gv = R.permute_dims(lv1, [0, 3, 1, 2])
                R.output(gv)
            return gv

    check(FoldConvolution, Before, After)
