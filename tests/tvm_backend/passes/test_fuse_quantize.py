"""The pass ``fuse_quantize``, before and after."""

from __future__ import annotations

from dataclasses import replace

from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from tests.tvm_backend.passes.tools import Q8, S8, check, kernel, untouched
from tvm_backend.kernels.spec import Epilogue, ProductSpec, QuantizeSpec, RowsSpec
from tvm_backend.passes.fuse_quantize import FuseQuantize

ROWS = RowsSpec(None, 8, "softmax", Epilogue())
PRODUCT = ProductSpec(None, 3, 8, 8, (Q8, S8), Epilogue())
REAL = replace(PRODUCT, inputs=("float32", "float32"))
QUANTIZE = QuantizeSpec(None, (3, 8), (Q8,))


def test_fuse_quantize():
    fused = [replace(spec, epilogue=Epilogue(outputs=(Q8,))) for spec in (ROWS, PRODUCT)]

    @I.ir_module
    class Before:
        @R.function
        def main(
            x: R.Tensor(("n", 3, 8), "uint8"),
            y: R.Tensor(("n", 8, 8), "int8"),
            z: R.Tensor(("m", 8), "float32"),
        ):
            n = T.int64()
            with R.dataflow():
                lv = kernel(PRODUCT, x, y)
                lv1 = kernel(QUANTIZE, lv)
                lv2 = kernel(ROWS, z)
                lv3 = R.reshape(lv2, R.shape([n, 3, 8]))
                lv4 = kernel(QUANTIZE, lv3)
                gv = (lv1, lv4)
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(
            x: R.Tensor(("n", 3, 8), "uint8"),
            y: R.Tensor(("n", 8, 8), "int8"),
            z: R.Tensor(("m", 8), "float32"),
        ):
            n = T.int64()
            with R.dataflow():
                lv1 = kernel(fused[1], x, y)
                lv2 = kernel(fused[0], z)
                lv4 = R.reshape(lv2, R.shape([n, 3, 8]))
                gv = (lv1, lv4)
                R.output(gv)
            return gv

    check(FuseQuantize, Before, After)


def test_fuse_quantize_declines():
    @I.ir_module
    class Module:
        @R.function
        def main(
            x: R.Tensor(("n", 3, 8), "float32"),
            y: R.Tensor(("n", 8, 8), "float32"),
            z: R.Tensor(("m", 8), "float32"),
        ):
            with R.dataflow():
                lv = kernel(REAL, x, y)  # may be no number
                lv1 = kernel(QUANTIZE, lv)
                lv2 = kernel(ROWS, z)  # read as float32 as well
                lv3 = kernel(QuantizeSpec(None, (8,), (Q8,)), lv2)
                gv = (lv1, lv2, lv3)
                R.output(gv)
            return gv

    untouched(FuseQuantize, Module)
