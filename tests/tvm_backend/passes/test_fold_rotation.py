"""The pass ``fold_rotation``, before and after."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from cat_plugin.ptq.transforms.rotation.hadamard import orthogonal
from tests.tvm_backend.passes.tools import check, const, kernel, untouched
from tvm_backend.kernels.spec import Epilogue, RotationSpec
from tvm_backend.passes.fold_rotation import FoldRotation, doublings

DOUBLED = np.array([[1.0, 1.0], [1.0, -1.0]])
FOUR = np.kron(DOUBLED, DOUBLED)


def graph(left, right):
    @I.ir_module
    class Module:
        @R.function
        def main(x: R.Tensor(("n", 3, left.size // len(left) * len(right)), "float32")):
            n = T.int64()
            with R.dataflow():
                lv = R.reshape(x, R.shape([n, 3, len(left), len(right)]))
                lv1 = R.matmul(lv, const(right))
                lv2 = R.matmul(const(left), lv1)
                gv = R.reshape(lv2, R.shape([n, 3, len(left) * len(right)]))
                R.output(gv)
            return gv

    return Module


def test_two_matrices_become_a_kernel():
    signs = np.array([1.0, -1.0, -1.0, 1.0])
    matrix = signs[:, None] * FOUR / 2
    spec = RotationSpec(None, 4, 1, 4, Epilogue())
    factors = const(np.kron(signs / 2, 3 * signs))

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 3, 16), "float32")):
            n = T.int64()
            with R.dataflow():
                lv = R.reshape(x, R.shape([n, 3, 4, 4]))
                lv1 = R.reshape(lv, R.shape([n * 3, 16]))
                lv2 = kernel(spec, lv1, factors)
                lv3 = R.reshape(lv2, R.shape([n, 3, 4, 4]))
                gv = R.reshape(lv3, R.shape([n, 3, 16]))
                R.output(gv)
            return gv

    check(FoldRotation, graph(matrix.T, 3 * signs[:, None] * FOUR), After)


def test_shapes_between_them_are_looked_through():
    left, right = const(DOUBLED), const(FOUR)

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 3, 2, 4), "float32")):
            n = T.int64()
            with R.dataflow():
                lv = R.reshape(x, R.shape([n * 6, 4]))
                lv1 = R.matmul(lv, right)
                lv2 = R.reshape(lv1, R.shape([n, 3, 2, 4]))
                lv3 = R.broadcast_to(left, R.shape([n, 3, 2, 2]))
                lv4 = R.reshape(lv3, R.shape([n * 3, 2, 2]))
                lv5 = R.reshape(lv2, R.shape([n * 3, 2, 4]))
                gv = R.matmul(lv4, lv5)
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 3, 2, 4), "float32")):
            n = T.int64()
            with R.dataflow():
                lv = R.reshape(x, R.shape([n * 6, 4]))
                lv1 = R.reshape(lv, R.shape([n * 3, 8]))
                lv2 = kernel(RotationSpec(None, 2, 1, 4, Epilogue()), lv1, const(np.ones(8)))
                gv = R.reshape(lv2, R.shape([n * 3, 2, 4]))
                R.output(gv)
            return gv

    check(FoldRotation, Before, After)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (np.eye(4), np.triu(FOUR)),  # entries of two sizes
        (np.eye(4), np.ones((4, 4))),  # no matrix of Sylvester's
        (np.eye(4), DOUBLED),  # vectors of two lanes
        (np.eye(257), FOUR),  # too much to multiply by
    ],
)
def test_a_matrix_of_another_kind_stays(left, right):
    untouched(FoldRotation, graph(left, right))


def test_rows_repeated_within_a_matrix_are_no_rotation():
    """Four matrices of equal columns have as many numbers as one whole matrix."""
    columns = const(FOUR.reshape(4, 4, 1))

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((4, 4, 4), "float32")):
            with R.dataflow():
                lv = R.matmul(x, const(FOUR))
                lv1 = R.broadcast_to(columns, R.shape([4, 4, 4]))
                gv = R.matmul(lv1, lv)
                R.output(gv)
            return gv

    untouched(FoldRotation, Before)


def test_one_product_for_several_matrices_is_no_rotation():
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((4, 4), "float32")):
            with R.dataflow():
                lv = R.matmul(x, const(FOUR))
                lv1 = R.broadcast_to(const(FOUR), R.shape([3, 4, 4]))
                gv = R.matmul(lv1, lv)
                R.output(gv)
            return gv

    untouched(FoldRotation, Before)


@pytest.mark.parametrize("n", [1, 2, 12, 20, 32, 48, 64, 88, 7])
def test_doublings_put_a_matrix_together_again(n):
    matrix = orthogonal(n, torch.Generator().manual_seed(n)).numpy()
    factors, size, core = doublings(matrix)
    whole = core
    for _ in range(size.bit_length() - 1):
        whole = np.kron(DOUBLED, whole)
    np.testing.assert_allclose(factors[:, None] * whole, matrix, atol=1e-12)
    assert size == {1: 1, 2: 2, 12: 1, 20: 1, 32: 32, 48: 4, 64: 64, 88: 2, 7: 1}[n]
