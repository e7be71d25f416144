"""The pass ``propagate_layout``, before and after."""

from __future__ import annotations

from tvm.script import ir as I
from tvm.script import relax as R

from tests.tvm_backend.passes.tools import (
    BIAS,
    BIAS_NCHW,
    END,
    Q8,
    check,
    const,
    dequantize,
    untouched,
)
from tvm_backend.passes.propagate_layout import PropagateLayout


def test_propagate_layout():
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
