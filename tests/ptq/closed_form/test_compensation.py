"""Least squares and error-compensated rounding: against numpy and exhaustive search."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from cat_plugin.ptq.closed_form import coordinate_descent
from cat_plugin.ptq.closed_form.compensation import fit_integers, least_squares_weight, ridge_by_halves
from cat_plugin.ptq.closed_form.moments import Moments, measure
from cat_plugin.ptq.graph.modules import QuantOp
from cat_plugin.ptq.quantizers.observers import search_weight_range
from tests.ptq.closed_form.layers import LAYERS, make_layer
from tests.ptq.models import small_inputs

_ATEN = torch.ops.aten


@pytest.mark.parametrize("case", LAYERS)
def test_least_squares_finds_the_weight_that_made_the_outputs(case):
    layer, _ = make_layer(case)
    shape = case[2]
    x = small_inputs(200, *shape[1:], seed=9)
    y = layer.compute(x, layer.weight, layer.bias)
    moments = measure(layer, x, y, 1 << 30, 32, torch.Generator())
    start = torch.zeros(layer.groups, len(layer.weight) // layer.groups, layer.weight[0].numel())
    found = least_squares_weight(start, moments, 1e-9).reshape(layer.weight.shape)
    torch.testing.assert_close(found.float(), layer.weight, rtol=1e-2, atol=2e-3)


def test_least_squares_equals_numpys_ridge_regression():
    layer, _ = make_layer(LAYERS[-1])
    x, y = small_inputs(300, 4, seed=1), small_inputs(300, 6, seed=2)
    moments = measure(layer, x, y, 1 << 30, 64, torch.Generator())
    found = least_squares_weight(layer.weight.unsqueeze(0), moments, 0.1)[0].numpy()
    a = (x - x.mean(0)).double().numpy()
    b = (y - y.mean(0)).double().numpy()
    h = a.T @ a / len(a)
    strength = 0.1 * np.trace(h) / 4
    prior = layer.weight.double().numpy()
    expected = np.linalg.solve(h + strength * np.eye(4), a.T @ b / len(a) + strength * prior.T).T
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def _loss(w, target, h):
    error = (w - target).double().numpy()
    return np.einsum("rk,kl,rl->r", error, h, error)


def test_compensated_rounding_comes_near_the_exhaustive_optimum_and_beats_rounding():
    k, rows, bits = 5, 12, 2
    x = small_inputs(400, k, seed=11) @ small_inputs(k, k, seed=12)  # correlated inputs
    layer = QuantOp("l", _ATEN.linear.default, small_inputs(rows, k, seed=13), None, (), bits, bits)
    moments = measure(layer, x, x @ layer.weight.T, 1 << 30, 64, torch.Generator())
    h = moments.h[0].numpy()
    scale, zero = search_weight_range(layer.weight, bits, symmetric=False)
    target = layer.weight.double()
    nearest = (
        torch.clamp((layer.weight / scale[:, None]).round() + zero[:, None], -2, 1) - zero[:, None]
    ) * scale[:, None]
    integers, fitted = fit_integers(
        target.unsqueeze(0), moments, scale.unsqueeze(0), zero.unsqueeze(0), (-2, 1), factors=(1.0,)
    )
    found = (integers[0].float() - zero[:, None]) * fitted[0][:, None]
    at_nearest, at_found = _loss(nearest, target, h), _loss(found, target, h)
    # the best integers there are, each with its best scale
    best = np.full(rows, np.inf)
    for q in itertools.product(range(-2, 2), repeat=k):
        centred = np.asarray(q, dtype=np.float64) - zero.numpy()[:, None]
        through = centred @ h
        power = (through * centred).sum(1)
        pull = (through * target.numpy()).sum(1)
        s = np.where(power > 0, np.maximum(pull, 0) / np.maximum(power, 1e-12), 0)
        best = np.minimum(best, _loss(torch.tensor(centred * s[:, None]), target, h))
    assert at_found.sum() < 0.7 * at_nearest.sum()
    assert at_found.sum() < 1.35 * best.sum()
    assert integers.dtype == torch.int8
    assert int(integers.min()) >= -2
    assert int(integers.max()) <= 1


def test_more_starting_scales_never_do_worse():
    layer, _ = make_layer(LAYERS[1], bits=3)
    x = small_inputs(64, 4, 7, 7, seed=2)
    moments = measure(layer, x, layer.compute(x, layer.weight, None), 1 << 30, 16, torch.Generator())
    target = layer.weight.reshape(2, 3, -1).double()
    scale, zero = (v.reshape(2, 3) for v in search_weight_range(layer.weight, 3, symmetric=False))
    losses = []
    for factors in ((1.0,), (0.9, 1.0, 1.1)):
        q, s = fit_integers(target, moments, scale, zero, (-4, 3), factors=factors)
        error = (q.double() - zero.unsqueeze(2)) * s.unsqueeze(2) - target
        losses.append(torch.einsum("grk,gkl,grl->gr", error, moments.h, error))
    assert bool((losses[1] <= losses[0] * 1.02 + 1e-12).all())


def test_dead_and_constant_inputs_do_no_harm():
    x = small_inputs(64, 6, 5, 5, seed=41)
    x[:, 0] = 0.0
    x[:, 1] = 1000.0
    x[:, 2] = 1000.0 + 1e-4 * x[:, 2]
    layer = QuantOp(
        "l", _ATEN.conv2d.default, small_inputs(6, 1, 3, 3, seed=42), None, ([1, 1], [1, 1], [1, 1], 6), 3, 3
    )
    y = layer.compute(x, layer.weight, None)
    moments = measure(layer, x, y, 1 << 30, 16, torch.Generator())
    target = least_squares_weight(layer.weight.reshape(6, 1, 9), moments, 0.01)
    scale, zero = (v.reshape(6, 1) for v in search_weight_range(target.flatten(0, 1), 3, symmetric=False))
    q, s = fit_integers(target, moments, scale, zero, (-4, 3))
    assert torch.isfinite(target).all()
    assert torch.isfinite(s).all()
    assert q.shape == (6, 1, 9)


@pytest.mark.parametrize("damage", ["indefinite", "singular", "nan"])
def test_a_covariance_that_cannot_be_factored_does_no_harm(damage):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(200, 6, generator=generator)
    weight = torch.randn(1, 3, 6, generator=generator)
    h = (x.T @ x / 200).double().unsqueeze(0)
    if damage == "indefinite":
        h = h - 2.0 * torch.eye(6, dtype=torch.float64)
    elif damage == "singular":
        h = torch.zeros_like(h)
    else:
        h = h * float("nan")
    moments = Moments(h, (h @ weight.double().transpose(1, 2)), torch.zeros(1, 6), torch.zeros(1, 3))
    target = least_squares_weight(weight, moments, 0.01)
    assert torch.isfinite(target).all()
    scale, zero = search_weight_range(weight[0], 4, True)
    integers, grid = fit_integers(weight.double(), moments, scale[None], zero[None], (-8, 7))
    assert torch.isfinite(grid).all()
    assert bool((grid > 0).all())
    assert int(integers.min()) >= -8
    assert int(integers.max()) <= 7
    if damage == "singular":  # nothing is known of the inputs: the trained weight, rounded within a step
        assert torch.allclose(target, weight.double())
        error = (integers.float() * grid.unsqueeze(2) - weight).abs() / grid.unsqueeze(2)
        assert float(error.max()) < 2.0


@pytest.mark.parametrize(("noise", "samples"), [(0.0, 600), (3.0, 40)])
def test_the_ridge_is_small_where_data_decide_and_large_where_they_are_noise(noise, samples):
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(samples, 30, generator=generator)
    trained, true = (torch.randn(5, 30, generator=generator) for _ in range(2))
    if noise:  # nothing to learn: the trained weight is the truth
        true = trained
    y = x @ true.T + noise * torch.randn(samples, 5, generator=generator)
    layer = QuantOp("layer", _ATEN.linear.default, trained, None, (), 4, 4)
    moments = measure(layer, x, y, 1 << 30, samples // 4, generator)
    ridge = ridge_by_halves(trained[None], moments, (0.01, 0.1, 1.0, 10.0))
    assert ridge == (10.0 if noise else 0.01)
    fresh = torch.randn(5000, 30, generator=generator).double()

    def risk(value):
        w = least_squares_weight(trained[None], moments, value)[0]
        return float((fresh @ (w - true.double()).T).square().mean())

    assert risk(ridge) == min(risk(value) for value in (0.01, 0.1, 1.0, 10.0))


@pytest.mark.parametrize("modulated", [False, True])
def test_residuals_that_go_from_sweep_to_sweep_lead_to_the_same_integers(monkeypatch, modulated):
    """As wide layers are fitted, beside what every sweep begins with anew."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(900, 150, generator=generator).relu() @ torch.rand(150, 150, generator=generator)
    layer = QuantOp("fc", _ATEN.linear.default, torch.randn(24, 150, generator=generator), None, (), 2, 8)
    moments = measure(layer, x, x @ layer.weight.T, 1 << 30, 128, torch.Generator())
    weight = layer.weight.unsqueeze(0).double()
    scale, zero_point = (v.reshape(1, -1) for v in search_weight_range(layer.weight, 2, False))
    factor = 0.5 + torch.rand(weight.shape, generator=generator) if modulated else None
    monkeypatch.setattr(coordinate_descent, "_BLOCK", 64)  # several blocks
    found = []
    for wide in (1 << 30, 1):
        monkeypatch.setattr(coordinate_descent, "_WIDE", wide)
        found.append(fit_integers(weight, moments, scale, zero_point, layer.qrange, modulation=factor))
    (q, s), (carried_q, carried_s) = found
    assert float((q != carried_q).float().mean()) < 0.002  # ties in float32
    torch.testing.assert_close(carried_s, s, rtol=1e-3, atol=0)
    naive = (weight / scale.unsqueeze(2) + zero_point.unsqueeze(2)).round().clamp(*layer.qrange)
    assert float((q != naive).float().mean()) > 0.1
