"""The pass ``fold_border``, before and after."""

from __future__ import annotations

from tvm.script import ir as I
from tvm.script import relax as R

from tests.tvm_backend.passes.tools import (
    S8,
    check,
    dequantize,
    kernel,
    quantize,
)
from tvm_backend.kernels.spec import (
    DequantizeSpec,
    QuantizeSpec,
)
from tvm_backend.passes.fold_border import FoldBorder


def test_fold_border():
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
