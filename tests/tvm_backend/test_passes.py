"""Each pass alone: TVMScript before and after, and graphs that it must leave as they are."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from tvm import relax  # noqa: E402
from tvm.script import ir as I  # noqa: E402
from tvm.script import relax as R  # noqa: E402

from tvm_backend import compat, dialect  # noqa: E402
from tvm_backend.kernels.spec import (  # noqa: E402
    ConcatSpec,
    ConvSpec,
    DequantizeSpec,
    ElementwiseSpec,
    Epilogue,
    LinearSpec,
    PoolSpec,
    QParams,
    QuantizeSpec,
    SubsampleSpec,
)

quantize, dequantize = dialect.quantize, dialect.dequantize
per_channel = dialect.dequantize_per_channel

Q8 = QParams(0.05, 3, 0, 255, "uint8")
Q2 = QParams(0.5, 0, 0, 3, "uint8")
S8 = QParams(0.02, -4, -128, 127, "int8")


def kernel(spec, *args):
    return dialect.kernel(spec, list(args), dialect.shape_of(args[0])[0])


RNG = np.random.default_rng(0)


def const(array, dtype="float32"):
    return compat.constant(np.asarray(array, dtype))


def check(rewrite, before, after):
    """`before` becomes `after`, but for a name bound to a name at the end; `after` stays as it is."""
    canonical = relax.transform.CanonicalizeBindings()
    compat.assert_structural_equal(canonical(rewrite(before)), canonical(after))
    untouched(rewrite, after)


def untouched(rewrite, mod):
    compat.assert_structural_equal(rewrite(mod), mod)


W = RNG.integers(-8, 8, (6, 4, 3, 3)).astype("int8")
SCALES = RNG.uniform(0.01, 0.1, 6).astype("float32")
BIAS = RNG.normal(size=6).astype("float32")
WEIGHT, W_SCALES, W_ZEROS = const(W, "int8"), const(SCALES), const(np.zeros(6), "int64")
SCALE = const((SCALES.astype("float64") * Q8.scale).astype("float32"))
ZEROS, BIAS_CONST, BIAS_NCHW = const(np.zeros(6)), const(BIAS), const(BIAS.reshape(1, 6, 1, 1))
CHANNEL = {"axis": 0, "qmin": -8, "qmax": 7}
CONV = ConvSpec(None, 8, 8, 4, 6, (3, 3), Q8, Epilogue(), padding=(1, 1, 1, 1), weight_bits=4)
RELU = dialect.with_epilogue(CONV, clip=(0.0, None))
END = 9223372036854775807


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

    check(FoldConstants, Before, After)


def test_unpack_tuples():
    from tvm_backend.passes.unpack_tuples import UnpackTuples

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


def test_hoist_quantize():
    from tvm_backend.passes.commute_quantization import HoistQuantize

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 4, 8, 8), "float32")):
            with R.dataflow():
                lv = R.nn.pad(x, (0, 0, 0, 0, 0, 1, 0, 1))
                gv = quantize(lv, Q8)
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 4, 8, 8), "float32")):
            with R.dataflow():
                lv = quantize(x, Q8)
                gv = R.nn.pad(lv, (0, 0, 0, 0, 0, 1, 0, 1), "constant", 3.0)
                R.output(gv)
            return gv

    check(HoistQuantize, Before, After)

    @I.ir_module
    class Other:
        @R.function
        def main(x: R.Tensor(("n", 4, 8, 8), "float32")):
            with R.dataflow():
                lv = R.nn.pad(x, (0, 0, 0, 0, 0, 1, 0, 1), "constant", 1.0)
                gv = quantize(lv, Q8)
                R.output(gv)
            return gv

    untouched(HoistQuantize, Other)


def test_sink_dequantize():
    from tvm_backend.passes.commute_quantization import SinkDequantize

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 4, 8, 8), "uint8")):
            with R.dataflow():
                lv = dequantize(x, Q8)
                lv1 = R.strided_slice(lv, (2,), (0,), (END,), (2,))
                gv = R.permute_dims(lv1, [0, 2, 3, 1])
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 4, 8, 8), "uint8")):
            with R.dataflow():
                lv1 = R.strided_slice(x, (2,), (0,), (END,), (2,))
                lv2 = R.permute_dims(lv1, [0, 2, 3, 1])
                gv = dequantize(lv2, Q8)
                R.output(gv)
            return gv

    check(SinkDequantize, Before, After)


def test_fold_convolution():
    from tvm_backend.passes.fold_convolution import FoldConvolution

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
    from tvm_backend.passes.fold_convolution import FoldConvolution

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


def test_fold_linear():
    from tvm_backend.passes.fold_linear import FoldLinear

    weight = RNG.integers(-8, 8, (4, 6)).astype("int8")
    spec = LinearSpec(None, 4, 6, Q8, Epilogue(), weight_bits=4)
    plain, transposed = const(weight, "int8"), const(weight.T.copy(), "int8")
    channel = {"axis": 1, "qmin": -8, "qmax": 7}

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 4), "uint8")):
            with R.dataflow():
                lv = dequantize(x, Q8)
                lv1 = per_channel(plain, W_SCALES, W_ZEROS, channel)
                gv = R.matmul(lv, lv1)
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 4), "uint8")):
            with R.dataflow():
                gv = kernel(spec, x, transposed, SCALE, ZEROS)
                R.output(gv)
            return gv

    check(FoldLinear, Before, After)

    @I.ir_module
    class TwoInputs:
        @R.function
        def main(x: R.Tensor(("n", 4), "uint8"), y: R.Tensor((4, 6), "float32")):
            with R.dataflow():
                lv = dequantize(x, Q8)
                gv = R.matmul(lv, y)
                R.output(gv)
            return gv

    untouched(FoldLinear, TwoInputs)


def test_fold_bias():
    from tvm_backend.passes.fold_bias import FoldBias

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8")):
            with R.dataflow():
                lv = kernel(CONV, x, WEIGHT, SCALE, ZEROS)
                lv1 = R.permute_dims(lv, [0, 3, 1, 2])
                gv = R.add(lv1, BIAS_NCHW)
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8")):
            with R.dataflow():
                lv = kernel(CONV, x, WEIGHT, SCALE, BIAS_CONST)
                gv = R.permute_dims(lv, [0, 3, 1, 2])
                R.output(gv)
            return gv

    check(FoldBias, Before, After)

    @I.ir_module
    class UsedTwice:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8")):
            with R.dataflow():
                lv = kernel(CONV, x, WEIGHT, SCALE, ZEROS)
                lv1 = R.permute_dims(lv, [0, 3, 1, 2])
                lv2 = R.add(lv1, BIAS_NCHW)
                gv = R.add(lv2, lv1)
                R.output(gv)
            return gv

    untouched(FoldBias, UsedTwice)


@pytest.mark.parametrize("operator", ["mean", "adaptive", "avg"])
def test_fold_pooling(operator):
    from tvm_backend.passes.fold_pooling import FoldPooling

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
    from tvm_backend.passes.fold_pooling import FoldPooling

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


def test_propagate_layout():
    from tvm_backend.passes.propagate_layout import PropagateLayout

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((2, 8, 8, 6), "float32"), y: R.Tensor((2, 8, 8, 6), "uint8")):
            with R.dataflow():
                lv = R.permute_dims(x, [0, 3, 1, 2])
                lv1 = R.add(lv, BIAS_NCHW)
                lv2 = R.nn.relu(lv1)
                lv3 = R.permute_dims(y, [0, 3, 1, 2])
                lv4 = dequantize(lv3, Q8)
                lv5 = R.add(lv2, lv4)
                lv6 = R.nn.pad(lv5, (0, 0, 1, 2, 0, 0, 0, 0))
                lv7 = R.strided_slice(lv6, (2,), (0,), (END,), (2,))
                lv8 = R.permute_dims(lv7, [0, 2, 3, 1])
                gv = R.nn.relu(lv8)
                R.output(gv)
            return gv

    bias_last = const(BIAS.reshape(1, 1, 1, 6))

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor((2, 8, 8, 6), "float32"), y: R.Tensor((2, 8, 8, 6), "uint8")):
            with R.dataflow():
                lv1 = R.add(x, bias_last)
                lv2 = R.nn.relu(lv1)
                lv4 = dequantize(y, Q8)
                lv5 = R.add(lv2, lv4)
                lv6 = R.nn.pad(lv5, (0, 0, 0, 0, 0, 0, 1, 2))
                lv7 = R.strided_slice(lv6, (1,), (0,), (END,), (2,))
                gv = R.nn.relu(lv7)
                R.output(gv)
            return gv

    check(PropagateLayout, Before, After)


def test_propagate_layout_drops_a_transposition_of_single_pixels():
    from tvm_backend.passes.propagate_layout import PropagateLayout

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((2, 1, 1, 6), "uint8")):
            with R.dataflow():
                lv = R.permute_dims(x, [0, 3, 1, 2])
                gv = R.reshape(lv, R.shape([2, 6]))
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor((2, 1, 1, 6), "uint8")):
            with R.dataflow():
                gv = R.reshape(x, R.shape([2, 6]))
                R.output(gv)
            return gv

    check(PropagateLayout, Before, After)

    @I.ir_module
    class Pixels:
        @R.function
        def main(x: R.Tensor((2, 2, 1, 6), "uint8")):
            with R.dataflow():
                lv = R.permute_dims(x, [0, 3, 1, 2])
                gv = R.reshape(lv, R.shape([2, 12]))
                R.output(gv)
            return gv

    untouched(PropagateLayout, Pixels)


def test_fold_subsample():
    from tvm_backend.passes.fold_subsample import FoldSubsample

    spec = SubsampleSpec(None, 8, 8, 4, (2, 2), 1, 1, Q8)

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8")):
            with R.dataflow():
                lv = R.strided_slice(x, (1,), (0,), (END,), (2,))
                lv1 = R.strided_slice(lv, (2,), (0,), (END,), (2,))
                lv2 = R.nn.pad(lv1, (0, 0, 0, 0, 0, 0, 1, 1), "constant", 3.0)
                gv = dequantize(lv2, Q8)
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8")):
            with R.dataflow():
                lv = kernel(spec, x)
                gv = dequantize(lv, Q8)
                R.output(gv)
            return gv

    check(FoldSubsample, Before, After)

    @I.ir_module
    class Crop:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8")):
            with R.dataflow():
                lv = R.strided_slice(x, (1,), (1,), (END,), (1,))
                gv = dequantize(lv, Q8)
                R.output(gv)
            return gv

    untouched(FoldSubsample, Crop)


def test_fold_concat():
    from tvm_backend.passes.fold_concat import FoldConcat

    spec = ConcatSpec(None, (8, 8), (4, 2), (Q8, S8), Epilogue())

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8"), y: R.Tensor(("n", 8, 8, 2), "int8")):
            with R.dataflow():
                lv = dequantize(x, Q8)
                lv1 = dequantize(y, S8)
                gv = R.concat((lv, lv1), axis=3)
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8"), y: R.Tensor(("n", 8, 8, 2), "int8")):
            with R.dataflow():
                gv = kernel(spec, x, y)
                R.output(gv)
            return gv

    check(FoldConcat, Before, After)


def test_fuse_residual():
    from tvm_backend.passes.fuse_residual import FuseResidual

    spec = dialect.with_epilogue(CONV, residual=S8)

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8"), y: R.Tensor(("n", 8, 8, 6), "int8")):
            with R.dataflow():
                lv = kernel(CONV, x, WEIGHT, SCALE, BIAS_CONST)
                lv1 = dequantize(y, S8)
                gv = R.add(lv, lv1)
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8"), y: R.Tensor(("n", 8, 8, 6), "int8")):
            with R.dataflow():
                gv = kernel(spec, x, WEIGHT, SCALE, BIAS_CONST, y)
                R.output(gv)
            return gv

    check(FuseResidual, Before, After)


def test_fuse_residual_with_its_branch():
    from tvm_backend.passes.fuse_residual import FuseResidual

    spec = dialect.with_epilogue(CONV, residual=S8, branch=Q8)

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8"), y: R.Tensor(("n", 8, 8, 6), "int8")):
            with R.dataflow():
                lv = kernel(CONV, x, WEIGHT, SCALE, BIAS_CONST)
                lv1 = quantize(lv, Q8)
                lv2 = dequantize(lv1, Q8)
                lv3 = dequantize(y, S8)
                gv = R.add(lv2, lv3)
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8"), y: R.Tensor(("n", 8, 8, 6), "int8")):
            with R.dataflow():
                gv = kernel(spec, x, WEIGHT, SCALE, BIAS_CONST, y)
                R.output(gv)
            return gv

    check(FuseResidual, Before, After)

    @I.ir_module
    class Shared:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8"), y: R.Tensor(("n", 8, 8, 6), "int8")):
            with R.dataflow():
                lv = kernel(CONV, x, WEIGHT, SCALE, BIAS_CONST)
                lv1 = quantize(lv, Q8)
                lv2 = dequantize(lv1, Q8)
                lv3 = dequantize(y, S8)
                lv4 = R.add(lv2, lv3)
                gv = (lv4, lv1)
                R.output(gv)
            return gv

    untouched(FuseResidual, Shared)


def test_fold_elementwise():
    from tvm_backend.passes.fold_elementwise import FoldElementwise

    both = ElementwiseSpec(None, (8, 8, 6), (Q8, S8), Epilogue())
    again = ElementwiseSpec(None, (8, 8, 6), (Q8,), Epilogue(outputs=(Q2,)))

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 6), "uint8"), y: R.Tensor(("n", 8, 8, 6), "int8")):
            with R.dataflow():
                lv = dequantize(x, Q8)
                lv1 = dequantize(y, S8)
                lv2 = R.add(lv, lv1)
                lv3 = quantize(lv, Q2)
                lv4 = quantize(lv, Q8)
                gv = (lv2, lv3, lv4)
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 6), "uint8"), y: R.Tensor(("n", 8, 8, 6), "int8")):
            with R.dataflow():
                lv2 = kernel(both, x, y)
                lv3 = kernel(again, x)
                gv = (lv2, lv3, x)
                R.output(gv)
            return gv

    check(FoldElementwise, Before, After)


def test_fuse_clip():
    from tvm_backend.passes.fuse_clip import FuseClip

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


def test_fuse_outputs():
    from tvm_backend.passes.fuse_outputs import FuseOutputs

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8")):
            with R.dataflow():
                lv = kernel(RELU, x, WEIGHT, SCALE, BIAS_CONST)
                lv1 = quantize(lv, Q2)
                lv2 = quantize(lv, Q8)
                gv = (lv1, lv2)
                R.output(gv)
            return gv

    two = dialect.with_epilogue(RELU, outputs=(Q2, Q8))

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8")):
            with R.dataflow():
                lv = kernel(two, x, WEIGHT, SCALE, BIAS_CONST)
                lv1 = lv[0]
                lv2 = lv[1]
                gv = (lv1, lv2)
                R.output(gv)
            return gv

    check(FuseOutputs, Before, After)


def test_fuse_outputs_keeps_the_float_value_that_is_used():
    from tvm_backend.passes.fuse_outputs import FuseOutputs

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8")):
            with R.dataflow():
                lv = kernel(CONV, x, WEIGHT, SCALE, BIAS_CONST)
                lv1 = quantize(lv, Q2)
                lv2 = R.sigmoid(lv)
                gv = (lv1, lv2)
                R.output(gv)
            return gv

    two = dialect.with_epilogue(CONV, outputs=(Q2, "float32"))

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8")):
            with R.dataflow():
                lv = kernel(two, x, WEIGHT, SCALE, BIAS_CONST)
                lv1 = lv[0]
                lv2 = lv[1]
                lv3 = R.sigmoid(lv2)
                gv = (lv1, lv3)
                R.output(gv)
            return gv

    check(FuseOutputs, Before, After)


def test_fold_border():
    from tvm_backend.passes.fold_border import FoldBorder

    into = QuantizeSpec(None, (3, 8, 8), (S8,), to_channels_last=True)
    out = DequantizeSpec(None, (8, 8, 3), S8, to_channels_first=True)

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 3, 8, 8), "float32")):
            with R.dataflow():
                lv = quantize(x, S8)
                lv1 = R.permute_dims(lv, [0, 2, 3, 1])
                lv2 = dequantize(lv1, S8)
                gv = R.permute_dims(lv2, [0, 3, 1, 2])
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 3, 8, 8), "float32")):
            with R.dataflow():
                lv1 = kernel(into, x)
                gv = kernel(out, lv1)
                R.output(gv)
            return gv

    check(FoldBorder, Before, After)


def test_passes_leave_a_float_graph_untouched():
    from tvm_backend.passes.pipeline import INTEGER_PASSES

    @I.ir_module
    class Module:
        @R.function
        def main(x: R.Tensor(("n", 3, 8, 8), "float32"), w: R.Tensor((4, 3, 3, 3), "float32")):
            with R.dataflow():
                lv = R.nn.conv2d(x, w, padding=(1, 1))
                lv1 = R.nn.relu(lv)
                lv2 = R.nn.max_pool2d(lv1, (2, 2), (2, 2))
                gv = R.nn.softmax(lv2, axis=1)
                R.output(gv)
            return gv

    for step in INTEGER_PASSES:
        untouched(step, Module)


@pytest.mark.parametrize("kinds", [(Q8,), (Q8, Q2)])
def test_bound_outputs(kinds):
    from tvm_backend.passes.bound_outputs import BoundOutputs

    relu6 = dataclasses.replace(CONV, epilogue=Epilogue((0.0, 6.0), S8, kinds, Q2))
    bounded = dataclasses.replace(CONV, epilogue=Epilogue((0.0, 6.0), S8, kinds, Q2, bounded=True))

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8"), r: R.Tensor(("n", 8, 8, 6), "int8")):
            with R.dataflow():
                gv = kernel(relu6, x, WEIGHT, SCALE, BIAS_CONST, r)
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8"), r: R.Tensor(("n", 8, 8, 6), "int8")):
            with R.dataflow():
                gv = kernel(bounded, x, WEIGHT, SCALE, BIAS_CONST, r)
                R.output(gv)
            return gv

    check(BoundOutputs, Before, After)


def test_bound_outputs_needs_integers_and_bounds():
    from tvm_backend.passes.bound_outputs import BoundOutputs

    floats = dialect.with_epilogue(CONV, outputs=("float32",))
    one = dialect.with_epilogue(CONV, outputs=(Q8,))
    huge = const(np.full(6, 1e6))

    @I.ir_module
    class Mod:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8")):
            with R.dataflow():
                a = kernel(floats, x, WEIGHT, SCALE, BIAS_CONST)
                b = kernel(one, x, WEIGHT, huge, BIAS_CONST)
                gv = (a, b)
                R.output(gv)
            return gv

    untouched(BoundOutputs, Mod)
