"""Linear kernels with scales for groups of weights, and grids for rows, against exact integer sums."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm.target import Target

from cat_plugin.errors import CompileError
from tests.tvm_backend.kernels.tools import (
    TARGETS,
    batches,
    check_kernel,
    epilogues,
    execute,
    expected_outputs,
    qparams,
    random_tensor,
    random_weight,
)
from tvm_backend.kernels.cpu.grouped_linear import reference
from tvm_backend.kernels.registry import lower
from tvm_backend.kernels.spec import Epilogue, GroupedLinearSpec, QParams


def own_grids(most: int) -> QParams:
    return QParams(1.0, 0, 0, most, "uint8")


def shifted(weight: np.ndarray, spec: GroupedLinearSpec, rng: np.random.Generator) -> np.ndarray:
    """As where each group has a zero point of its own."""
    half = 2 ** (spec.weight_bits - 1)
    zeros = rng.integers(-half, half, (spec.out_features, spec.groups, 1))
    return (weight.reshape(spec.out_features, spec.groups, -1) - zeros).reshape(weight.shape).astype(np.int8)


@st.composite
def layers(draw: st.DrawFn) -> tuple[GroupedLinearSpec, int]:
    batch, known = draw(st.tuples(st.integers(1, 20), st.booleans()) | batches)
    groups, tokens = draw(st.integers(1, 5)), draw(st.booleans())
    spec = GroupedLinearSpec(
        batch=batch if known else None,
        in_features=groups * draw(st.integers(1, 40)),
        out_features=draw(st.integers(1, 150)),
        input=own_grids(draw(st.sampled_from([3, 15, 255]))) if tokens else draw(qparams()),
        epilogue=draw(epilogues()),
        weight_bits=draw(st.sampled_from([2, 3, 4, 8])),
        groups=groups,
        tokens=tokens,
    )
    return spec, batch


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=15, deadline=None)
@given(case=layers(), seed=st.integers(0, 2**32 - 1))
def test_any_layer_equals_the_reference_to_the_bit(target, case, seed):
    spec, batch = case
    rng = np.random.default_rng(seed)
    data = random_tensor(spec.input, (batch, spec.in_features), rng)
    weight = random_weight(spec.weight_bits, spec.weight_shape, rng)
    if fitted := rng.integers(2):
        weight = weight // 2
    elif spec.weight_bits < 8:
        weight = shifted(weight, spec, rng)
    kernel = lower(spec, Target(TARGETS[target]), weight if fitted else None)
    check_kernel(kernel, Target(TARGETS[target]), data, weight, rng, reference)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("bits", "groups"), [(8, 1), (4, 1), (4, 6), (2, 6)])
def test_a_layer_of_an_encoder(target, bits, groups):
    spec = GroupedLinearSpec(None, 384, 384, own_grids(255), Epilogue(), bits, groups, tokens=True)
    rng = np.random.default_rng(4)
    data, weight = random_tensor(spec.input, (13, 384), rng), random_weight(bits, spec.weight_shape, rng)
    check_kernel(lower(spec, Target(TARGETS[target])), Target(TARGETS[target]), data, weight, rng, reference)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("bits", "groups", "features", "outputs"),
    [(8, 1, 37, 5), (4, 6, 384, 70), (4, 3, 39, 33), (2, 5, 35, 130)],
)
@pytest.mark.parametrize("batch", [1, 13])
def test_rows_of_float32_are_within_a_few_roundings(target, bits, groups, features, outputs, batch):
    none = QParams(1.0, 0, -128, 127, "int8")
    spec = GroupedLinearSpec(None, features, outputs, none, Epilogue(), bits, groups, real=True)
    rng = np.random.default_rng(bits)
    data = rng.normal(size=(batch, features)).astype(np.float32)
    weight = random_weight(bits, spec.weight_shape, rng)
    machine = Target(TARGETS[target])
    kernel = lower(spec, machine, weight)
    arguments, (expected,) = expected_outputs(kernel, data, weight, rng, reference)
    (found,) = execute(kernel, machine, arguments, [np.full_like(expected, 77)])
    scale, bias = arguments[3][:, :outputs], arguments[4]
    whole = np.abs(weight) * np.repeat(scale, features // groups, 0).T
    bound = 2.0**-20 * (np.abs(data) @ whole.T + np.abs(bias))
    assert (np.abs(found - expected) <= bound).all()


def test_what_cannot_be_grouped_is_refused():
    with pytest.raises(CompileError, match="10 features cannot be cut into 3 equal groups"):
        GroupedLinearSpec(None, 10, 4, own_grids(255), Epilogue(), groups=3)
    with pytest.raises(CompileError, match="have no grids"):
        GroupedLinearSpec(None, 10, 4, own_grids(255), Epilogue(), tokens=True, real=True)
