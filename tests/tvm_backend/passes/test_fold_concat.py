"""The pass ``fold_concat``, before and after."""

from __future__ import annotations

from tvm.script import ir as I
from tvm.script import relax as R

from tests.tvm_backend.passes.tools import (
    Q8,
    S8,
    check,
    dequantize,
    kernel,
)
from tvm_backend.kernels.spec import (
    ConcatSpec,
    Epilogue,
)
from tvm_backend.passes.fold_concat import FoldConcat


def test_fold_concat():
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
