"""The pass ``fold_linear``, before and after."""

from __future__ import annotations

from tvm.script import ir as I
from tvm.script import relax as R

from tests.tvm_backend.passes.tools import (
    Q8,
    RNG,
    SCALE,
    W_SCALES,
    W_ZEROS,
    ZEROS,
    check,
    const,
    dequantize,
    kernel,
    per_channel,
    untouched,
)
from tvm_backend.kernels.spec import (
    Epilogue,
    LinearSpec,
)
from tvm_backend.passes.fold_linear import FoldLinear


def test_fold_linear():
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
