"""The passes ``fold_product`` and ``drop_broadcasts``, before and after."""

from __future__ import annotations

from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from tests.tvm_backend.passes.tools import Q8, S8, check, kernel, untouched
from tvm_backend.kernels.spec import DequantizeSpec, Epilogue, ProductSpec
from tvm_backend.passes.drop_broadcasts import DropBroadcasts
from tvm_backend.passes.fold_product import FoldProduct

REAL = ("float32", "float32")


def test_fold_product_of_integers_under_exchanged_axes():
    spec = ProductSpec(None, 5, 8, 7, (Q8, S8), Epilogue(), transposed=True)

    @I.ir_module
    class Before:
        @R.function
        def main(q: R.Tensor(("n", 5, 8), "uint8"), k: R.Tensor(("n", 7, 8), "int8")):
            with R.dataflow():
                lv = R.permute_dims(k, axes=[0, 2, 1])
                lv1 = kernel(DequantizeSpec(None, (5, 8), Q8), q)
                lv2 = kernel(DequantizeSpec(None, (8, 7), S8), lv)
                gv = R.matmul(lv1, lv2)
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(q: R.Tensor(("n", 5, 8), "uint8"), k: R.Tensor(("n", 7, 8), "int8")):
            with R.dataflow():
                gv = kernel(spec, q, k)
                R.output(gv)
            return gv

    check(FoldProduct, Before, After)


def test_fold_product_of_reals_merges_heads():
    @I.ir_module
    class Before:
        @R.function
        def main(p: R.Tensor((2, 3, 5, 7), "float32"), v: R.Tensor((2, 3, 7, 8), "float32")):
            with R.dataflow():
                gv = R.matmul(p, v)
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(p: R.Tensor((2, 3, 5, 7), "float32"), v: R.Tensor((2, 3, 7, 8), "float32")):
            with R.dataflow():
                lv = R.reshape(p, R.shape([6, 5, 7]))
                lv1 = R.reshape(v, R.shape([6, 7, 8]))
                lv2 = kernel(ProductSpec(6, 5, 7, 8, REAL, Epilogue()), lv, lv1)
                gv = R.reshape(lv2, R.shape([2, 3, 5, 8]))
                R.output(gv)
            return gv

    check(FoldProduct, Before, After)


def test_fold_product_of_rows_with_one_matrix():
    spec = ProductSpec(None, 1, 8, 4, REAL, Epilogue(), shared=True)

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", "m", 8), "float32"), w: R.Tensor((8, 4), "float32")):
            with R.dataflow():
                gv = R.matmul(x, w)
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", "m", 8), "float32"), w: R.Tensor((8, 4), "float32")):
            n, m = T.int64(), T.int64()
            with R.dataflow():
                lv = R.reshape(x, R.shape([n * m, 8]))
                lv1 = kernel(spec, lv, w)
                gv = R.reshape(lv1, R.shape([n, m, 4]))
                R.output(gv)
            return gv

    check(FoldProduct, Before, After)


def test_fold_product_declines():
    @I.ir_module
    class Module:
        @R.function
        def main(
            x: R.Tensor(("n", 5, 8), "float32"),
            y: R.Tensor((1, 8, 4), "float32"),
            z: R.Tensor((1, 4, "m"), "float32"),
        ):
            with R.dataflow():
                lv = R.matmul(x, y)  # repeated
                gv = R.matmul(lv, z)  # of a size that is not known
                R.output(gv)
            return gv

    untouched(FoldProduct, Module)


def test_drop_broadcasts():
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 1, 8), "float32")):
            n = T.int64()
            with R.dataflow():
                lv = R.broadcast_to(x, R.shape([n, 1, 8]))
                lv1 = R.nn.relu(lv)
                gv = R.broadcast_to(lv1, R.shape([n, 5, 8]))
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 1, 8), "float32")):
            n = T.int64()
            with R.dataflow():
                lv1 = R.nn.relu(x)
                gv = R.broadcast_to(lv1, R.shape([n, 5, 8]))
                R.output(gv)
            return gv

    check(DropBroadcasts, Before, After)
