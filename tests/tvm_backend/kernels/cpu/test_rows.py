"""Softmax, LayerNorm, RMSNorm and GELU of rows: how far they are from float64, and what they make of numbers that are none."""

from __future__ import annotations

import numpy as np
import pytest
from tvm.target import Target

from tests.tvm_backend.kernels.tools import TARGETS, execute
from tvm_backend.kernels.cpu.rows import reference
from tvm_backend.kernels.registry import lower
from tvm_backend.kernels.spec import Epilogue, QParams, RowsSpec

PLAIN = Epilogue()
BYTES = QParams(1 / 64, 0, 0, 255, "uint8")


def run(spec, target, data, *constants):
    dtypes = [np.uint8 if isinstance(kind, QParams) else np.float32 for kind in spec.out_kinds]
    blank = [np.full((len(data), spec.features), 77, dtype) for dtype in dtypes]
    target = Target(TARGETS[target])
    return execute(lower(spec, target), target, [data, *constants], blank)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("features", [1, 23, 257])
def test_softmax_is_within_a_few_roundings(target, features):
    spec = RowsSpec(None, features, "softmax", Epilogue(outputs=("float32", BYTES)))
    data = (8 * np.random.default_rng(0).normal(size=(7, features))).astype(np.float32)
    data[1, features // 2 :] = -np.inf  # masked
    data[2] += 3e4
    data[3, 0] = np.nan
    data[4] = -np.inf
    with np.errstate(invalid="ignore"):
        difference = data.astype(float) - data.max(axis=1, keepdims=True)
        powers = np.exp(difference)
        exact = powers / powers.sum(axis=1, keepdims=True)
    found, integers = run(spec, target, data)
    finite = np.isfinite(exact)
    assert (np.isfinite(found) == finite).all()
    # Powers below e ** -87, masked ones for instance, are 0.
    # The difference to the largest number is rounded, which is a relative error of its power.
    bound = 2.0**-20 + 2.0**-24 * np.abs(np.maximum(difference, -90))
    assert (np.abs(found - exact)[finite] <= bound[finite] * exact[finite] + 2.0**-120).all()
    rounded = np.clip(np.rint(found[finite] * np.float32(64)), 0, 255)
    np.testing.assert_array_equal(integers[finite], rounded)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("features", [5, 384])
def test_layer_norm_is_within_a_few_roundings(target, features):
    spec = RowsSpec(None, features, "layer_norm", PLAIN, epsilon=1e-6)
    rng = np.random.default_rng(0)
    data = (rng.normal(size=(6, features)) * rng.uniform(0.01, 30, (6, 1))).astype(np.float32)
    gamma, beta = rng.normal(size=(2, features)).astype(np.float32)
    x = data.astype(float)
    centred = x - x.mean(axis=1, keepdims=True)
    normal = centred / np.sqrt(x.var(axis=1, keepdims=True) + 1e-6)
    (found,) = run(spec, target, data, gamma, beta)
    bound = 2.0**-20 * ((1 + np.abs(normal)) * np.abs(gamma) + np.abs(beta))
    assert (np.abs(found - (normal * gamma + beta)) <= bound).all()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("features", [5, 384, 2049])
def test_rms_norm_is_within_a_few_roundings(target, features):
    spec = RowsSpec(None, features, "rms_norm", PLAIN, epsilon=1e-6)
    rng = np.random.default_rng(0)
    data = (rng.normal(size=(6, features)) * rng.uniform(0.001, 30, (6, 1))).astype(np.float32)
    data[1] += 100  # far from zero
    data[2] = 0
    gamma = rng.normal(size=features).astype(np.float32)
    x = data.astype(float)
    exact = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-6) * gamma
    np.testing.assert_allclose(reference(spec, data, gamma)[0], exact, rtol=1e-6)
    (found,) = run(spec, target, data, gamma)
    assert (np.abs(found - exact) <= 2.0**-20 * np.abs(exact)).all()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("function", ["gelu", "gelu_tanh"])
def test_gelu_is_within_a_few_roundings(target, function):
    spec = RowsSpec(2, 41, function, PLAIN)
    x = np.linspace(-9, 9, 82).astype(np.float32).reshape(2, 41)
    (found,), (exact,) = run(spec, target, x), reference(spec, x)
    assert (np.abs(found - exact) <= 2.0**-20 * np.maximum(1, np.abs(x))).all()
    x[0, :3] = np.inf, np.nan, 60
    (found,) = run(spec, target, x)
    assert found[0, 0] == np.inf
    assert np.isnan(found[0, 1])
    assert found[0, 2] == 60
    (integers,) = run(RowsSpec(2, 41, function, Epilogue(outputs=(BYTES,))), target, x)
    assert list(integers[0, :3]) == [255, 0, 255]
