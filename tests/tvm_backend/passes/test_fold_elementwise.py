"""The pass ``fold_elementwise``, before and after."""

from __future__ import annotations

from tvm.script import ir as I
from tvm.script import relax as R

from tests.tvm_backend.passes.tools import (
    Q2,
    Q8,
    S8,
    check,
    dequantize,
    kernel,
    quantize,
)
from tvm_backend.kernels.spec import (
    ElementwiseSpec,
    Epilogue,
)
from tvm_backend.passes.fold_elementwise import FoldElementwise


def test_fold_elementwise():
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
