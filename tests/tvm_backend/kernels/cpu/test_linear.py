"""Fully connected kernels against exact integer sums."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm.target import Target

from tests.tvm_backend.kernels.tools import (
    TARGETS,
    batches,
    check_kernel,
    check_weighted,
    epilogues,
    qparams,
    random_tensor,
    random_weight,
)
from tvm_backend.kernels.cpu.linear import reference
from tvm_backend.kernels.registry import lower
from tvm_backend.kernels.spec import Epilogue, LinearSpec, QParams


@st.composite
def layers(draw: st.DrawFn) -> tuple[LinearSpec, int]:
    batch, known = draw(st.tuples(st.integers(1, 20), st.booleans()) | batches)
    spec = LinearSpec(
        batch=batch if known else None,
        in_features=draw(st.integers(1, 150)),
        out_features=draw(st.integers(1, 150)),
        input=draw(qparams()),
        epilogue=draw(epilogues()),
        weight_bits=draw(st.sampled_from([2, 3, 4, 8])),
    )
    return spec, batch


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=25, deadline=None)
@given(case=layers(), seed=st.integers(0, 2**32 - 1))
def test_any_layer_equals_the_reference_to_the_bit(target, case, seed):
    spec, batch = case
    rng = np.random.default_rng(seed)
    data = random_tensor(spec.input, (batch, spec.in_features), rng)
    weight = random_weight(spec.weight_bits, spec.weight_shape, rng)
    if fitted := rng.integers(2):
        weight = weight // 2
    kernel = lower(spec, Target(TARGETS[target]), weight if fitted else None)
    check_kernel(kernel, Target(TARGETS[target]), data, weight, rng, reference)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("batch", [1, 16])
def test_classifier(target, bits, batch):
    spec = LinearSpec(None, 512, 1000, QParams(0.02, 0, 0, 255, "uint8"), Epilogue(), bits)
    rng = np.random.default_rng(4)
    data = random_tensor(spec.input, (batch, 512), rng)
    check_weighted(spec, target, data, random_weight(bits, spec.weight_shape, rng), rng, reference)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize(
    ("bits", "most", "extremes"),
    [
        (2, 255, (-3, 3)),
        (4, 255, (-15, 15)),
        (4, 15, (-15, 15)),
        (8, 15, (-128, 127)),
        (8, 255, (-128, 127)),
        (2, 3, (-3, 3)),
    ],
)
def test_the_largest_products_do_not_overflow(target, batch, bits, most, extremes):
    spec = LinearSpec(None, 7301, 37, QParams(0.02, 0, 0, most, "uint8"), Epilogue(), bits)
    weight = np.full(spec.weight_shape, extremes[0], np.int8)
    weight[::2] = extremes[1]
    data = np.full((batch, 7301), most, np.uint8)
    check_weighted(spec, target, data, weight, np.random.default_rng(0), reference)
