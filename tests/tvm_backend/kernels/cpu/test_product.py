"""Products of matrices that are both computed at run time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm.target import Target

from tests.tvm_backend.kernels.tools import (
    TARGETS,
    batches,
    check,
    epilogues,
    execute,
    qparams,
    random_tensor,
)
from tvm_backend.kernels.cpu.product import reference
from tvm_backend.kernels.registry import lower
from tvm_backend.kernels.spec import Epilogue, ProductSpec, QParams

SIZES = st.tuples(*[st.integers(1, 40) | st.sampled_from([16, 64, 65])] * 3)
Q, K = QParams(0.02, 120, 0, 255, "uint8"), QParams(0.03, -3, -128, 127, "int8")


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=12, deadline=None)
@given(
    sizes=SIZES,
    count=batches,
    inputs=st.tuples(qparams(), qparams()),
    epilogue=epilogues(residual=False),
    transposed=st.booleans(),
    shared=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_products_of_integers_equal_the_reference_to_the_bit(
    target, sizes, count, inputs, epilogue, transposed, shared, seed
):
    batch, known = count
    sizes = (1, *sizes[1:]) if shared else sizes
    batch = 3 * batch if shared else batch
    spec = ProductSpec(batch if known else None, *sizes, inputs, epilogue, transposed, shared)
    rng = np.random.default_rng(seed)
    given_ = [random_tensor(item.kind, (batch, *item.shape), rng) for item in spec.reads]
    given_[1] = given_[1][0] if shared else given_[1]
    check(spec, target, given_, reference(spec, *given_))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("sizes", "transposed"), [((19, 33, 40), False), ((7, 64, 70), True), ((1, 5, 3), False)]
)
def test_products_of_reals_are_as_exact_as_sums_of_float32(target, sizes, transposed):
    """Within ``inner * 2**-23`` of the sum of magnitudes, in float64."""
    spec = ProductSpec(None, *sizes, ("float32", "float32"), Epilogue(), transposed=transposed)
    rng = np.random.default_rng(0)
    left, right = (rng.normal(size=(2, *item.shape)).astype(np.float32) for item in spec.reads)
    kernel = lower(spec, Target(TARGETS[target]))
    (found,) = execute(
        kernel, Target(TARGETS[target]), [left, right], [np.full((2, sizes[0], sizes[2]), 77, np.float32)]
    )
    exact = right.astype(float).swapaxes(1, 2) if transposed else right.astype(float)
    bound = sizes[1] * 2.0**-23 * (np.abs(left.astype(float)) @ np.abs(exact)) + 1e-30
    assert (np.abs(found - left.astype(float) @ exact) <= bound).all()


@pytest.mark.parametrize("target", TARGETS)
def test_products_of_many_rows_with_one_matrix_of_reals(target):
    spec = ProductSpec(None, 1, 33, 70, ("float32", "float32"), Epilogue(), shared=True)
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(19, 33)).astype(np.float32), rng.normal(size=(33, 70)).astype(np.float32)
    blank = [np.full((19, 70), 77, np.float32)]
    (found,) = execute(lower(spec, Target(TARGETS[target])), Target(TARGETS[target]), [left, right], blank)
    bound = 33 * 2.0**-23 * (np.abs(left.astype(float)) @ np.abs(right.astype(float)))
    assert (np.abs(found - left.astype(float) @ right.astype(float)) <= bound).all()


@pytest.mark.parametrize("target", TARGETS)
def test_the_extremes_of_a_head_do_not_overflow(target):
    spec = ProductSpec(None, 13, 257, 64, (Q, K), Epilogue(outputs=("float32", K)))
    left, right = np.full((6, 13, 257), 255, np.uint8), np.full((6, 257, 64), -128, np.int8)
    check(spec, target, [left, right], reference(spec, left, right))
