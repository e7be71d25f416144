"""The pass ``commute_quantization``, before and after."""

from __future__ import annotations

from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

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


def test_places_read_and_broadcasts_move_integers():
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 4, 1, 8), "uint8")):
            n = T.int64()
            with R.dataflow():
                lv = dequantize(x, Q8)
                lv1 = R.take(lv, R.const([2, 0], "int64"), axis=1)
                lv2 = R.flip(lv1, axis=3)
                gv = R.broadcast_to(lv2, (n, 2, 6, 8))
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 4, 1, 8), "uint8")):
            n = T.int64()
            with R.dataflow():
                lv = R.take(x, R.const([2, 0], "int64"), axis=1)
                lv1 = R.flip(lv, axis=3)
                lv2 = R.broadcast_to(lv1, (n, 2, 6, 8))
                gv = dequantize(lv2, Q8)
                R.output(gv)
            return gv

    check(SinkDequantize, Before, After)
