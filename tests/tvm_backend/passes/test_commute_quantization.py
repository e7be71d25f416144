"""The pass ``commute_quantization``, before and after."""

from __future__ import annotations

from tvm.script import ir as I
from tvm.script import relax as R

from tests.tvm_backend.passes.tools import (
    END,
    Q8,
    check,
    dequantize,
    quantize,
    untouched,
)
from tvm_backend.passes.commute_quantization import HoistQuantize, SinkDequantize


def test_hoist_quantize():
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
