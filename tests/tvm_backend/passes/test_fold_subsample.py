"""The pass ``fold_subsample``, before and after."""

from __future__ import annotations

from tvm.script import ir as I
from tvm.script import relax as R

from tests.tvm_backend.passes.tools import (
    END,
    Q8,
    check,
    dequantize,
    kernel,
    untouched,
)
from tvm_backend.kernels.spec import (
    SubsampleSpec,
)
from tvm_backend.passes.fold_subsample import FoldSubsample


def test_fold_subsample():
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
