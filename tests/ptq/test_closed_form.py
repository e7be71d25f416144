"""Moments, least squares, error-compensated rounding, ranges: against numpy and exhaustive search."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.closed_form import layer_fit
from cat_plugin.ptq.closed_form.bias_correction import corrected_bias, shift_behind_clip
from cat_plugin.ptq.closed_form.compensation import fit_integers, least_squares_weight, ridge_by_halves
from cat_plugin.ptq.closed_form.moments import Moments, input_patches, measure
from cat_plugin.ptq.graph.modules import QuantOp
from cat_plugin.ptq.quantizers.observers import search_activation_range, search_weight_range
from tests.ptq.models import randomise, small_inputs

_ATEN = torch.ops.aten
LAYERS = [
    (_ATEN.conv2d.default, (6, 4, 3, 3), (5, 4, 9, 8), ([2, 1], [1, 2], [1, 2], 1)),
    (_ATEN.conv2d.default, (6, 2, 3, 3), (5, 4, 7, 7), ([1, 1], [1, 1], [1, 1], 2)),
    (_ATEN.conv2d.default, (4, 1, 3, 3), (5, 4, 7, 7), ([1, 1], [0, 0], [1, 1], 4)),
    (_ATEN.conv2d.padding, (6, 4, 4, 3), (5, 4, 9, 8), ([1, 1], "same")),
    (_ATEN.conv1d.default, (6, 4, 5), (5, 4, 17), ([2], [3], [1], 1)),
    (_ATEN.linear.default, (6, 4), (5, 7, 4), ()),
]


def _layer(case, bits=4):
    target, weight_shape, input_shape, extra = case
    weight, bias = small_inputs(*weight_shape, seed=3), small_inputs(weight_shape[0], seed=4)
    return QuantOp("layer", target, weight, bias, extra, bits, bits), small_inputs(*input_shape, seed=5)


@pytest.mark.parametrize("case", LAYERS)
def test_patches_times_weight_is_the_layer(case):
    layer, x = _layer(case)
    patches = input_patches(layer, x)
    weight = layer.weight.reshape(layer.groups, -1, patches.shape[2])
    rows = torch.einsum("gpk,grk->gpr", patches, weight)
    y = layer.compute(x, layer.weight, None)
    columns = y if layer.kind == "linear" else y.movedim(1, -1)
    expected = columns.reshape(-1, layer.groups, weight.shape[1]).transpose(0, 1)
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", LAYERS)
def test_least_squares_finds_the_weight_that_made_the_outputs(case):
    layer, _ = _layer(case)
    shape = case[2]
    x = small_inputs(200, *shape[1:], seed=9)
    y = layer.compute(x, layer.weight, layer.bias)
    moments = measure(layer, x, y, 1 << 30, 32, torch.Generator())
    start = torch.zeros(layer.groups, len(layer.weight) // layer.groups, layer.weight[0].numel())
    found = least_squares_weight(start, moments, 1e-9).reshape(layer.weight.shape)
    torch.testing.assert_close(found.float(), layer.weight, rtol=1e-2, atol=2e-3)


def test_least_squares_equals_numpys_ridge_regression():
    layer, _ = _layer(LAYERS[-1])
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


@pytest.mark.parametrize("case", LAYERS[:-1])
def test_patches_at_some_positions_are_those_of_all(case):
    layer, x = _layer(case)
    everything = input_patches(layer, x)
    per_image = everything.shape[1] // len(x)
    positions = torch.tensor([per_image - 1, 0, per_image // 2])
    expected = everything.unflatten(1, (len(x), per_image))[:, :, positions].flatten(1, 2)
    assert torch.equal(input_patches(layer, x, positions), expected)


def test_sampling_positions_keeps_the_moments():
    layer, x = _layer(LAYERS[0])
    x = small_inputs(64, *x.shape[1:], seed=7)
    y = layer.compute(x, layer.weight, layer.bias)
    everything = measure(layer, x, y, 1 << 30, 16, torch.Generator())
    some = measure(layer, x, y, y.numel() // 6 // 3, 16, torch.Generator().manual_seed(0))
    assert float((some.h - everything.h).norm() / everything.h.norm()) < 0.2


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
    layer, _ = _layer(LAYERS[1], bits=3)
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


@pytest.mark.parametrize("case", LAYERS)
def test_corrected_bias_restores_the_mean_of_every_channel(case):
    layer, _ = _layer(case, bits=2)
    x = small_inputs(40, *case[2][1:], seed=8).abs()
    y = layer.compute(x, layer.weight, layer.bias)
    x_q = x + 0.3
    layer.scale, layer.zero_point = search_weight_range(layer.weight, 2, symmetric=True)
    layer.q_weight = layer.round_to_nearest()
    layer.bias = corrected_bias(layer, measure(layer, x_q, y, 1 << 30, 8, torch.Generator()))
    axes = [d for d in range(y.ndim) if d != (y.ndim - 1 if layer.kind == "linear" else 1)]
    torch.testing.assert_close(layer(x_q).mean(axes), y.mean(axes), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weight_range_is_no_worse_than_min_max(bits, symmetric):
    weight = small_inputs(6, 40, seed=21) ** 3 + (0.0 if symmetric else 0.8)
    scale, zero = search_weight_range(weight, bits, symmetric)
    qmin, qmax = -(1 << (bits - 1)), (1 << (bits - 1)) - 1

    def error(s, z):
        q = ((weight / s[:, None]).round() + z[:, None]).clamp(qmin, qmax)
        return (((q - z[:, None]) * s[:, None] - weight) ** 2).sum(1)

    plain = weight.abs().amax(1) / -qmin
    assert bool((error(scale, zero) <= error(plain, torch.zeros(6)) * (1.3 if bits == 8 else 1.05)).all())
    assert bool((scale > 0).all())
    assert int(zero.min()) >= qmin
    assert int(zero.max()) <= qmax
    assert not symmetric or not bool(zero.any())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("make", [F.relu, F.gelu, lambda x: x - 3.0, lambda x: -x.abs()])
def test_activation_range_fits_the_data(bits, make):
    x = make(small_inputs(20000, seed=31))
    scale, zero, signed = search_activation_range(x, bits, symmetric=False)
    qmin, qmax = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    assert signed == bool((x < 0).any())
    assert qmin <= zero <= qmax
    assert signed or zero == 0
    error = ((((x / scale).round() + zero).clamp(qmin, qmax) - zero) * scale - x).square().mean()
    # a uniform quantizer over the whole range has at most a twelfth of the squared step
    span = max(float(x.max()), 0.0) - min(float(x.min()), 0.0)
    assert float(error) <= 1.3 * (span / (qmax - qmin)) ** 2 / 12


def test_constant_activations_are_represented_exactly():
    for value in (0.0, 2.5, -2.5):
        scale, zero, signed = search_activation_range(torch.full((100,), value), 4, symmetric=False)
        qmin, qmax = (-8, 7) if signed else (0, 15)
        q = np.clip(round(value / scale) + zero, qmin, qmax)
        assert (q - zero) * scale == pytest.approx(value, abs=1e-6)


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


def test_a_layer_behind_a_shortcut_takes_up_what_the_shortcut_has_lost(monkeypatch):
    """The last of four sums comes nearer to full precision than if each branch were fitted for itself."""

    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.blocks = nn.Sequential(*(Branch() for _ in range(4)))

        def forward(self, x):
            return self.blocks(self.stem(x)).flatten(1)

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)

        def forward(self, x):
            return x + self.b(torch.relu(self.a(x)))

    model, x = randomise(Stream()), small_inputs(96, 3, 8, 8)
    spec = QuantSpec(w_bits=2, a_bits=2, residual_bits=2, preset="fast", batch_size=16)

    def error():
        module, _ = quantize(model, spec, x[:64])
        with torch.no_grad():
            y = model(x[64:])
            return float((module(x[64:]) - y).square().mean() / y.square().mean())

    together = error()
    monkeypatch.setattr(layer_fit, "_shortcut", lambda *_: None)
    assert together < 0.96 * error()


def test_integers_of_a_layer_with_few_samples_carry_over_to_others(monkeypatch):
    """96 inputs, 64 samples that hold little of the outputs' noise: the covariance is damped, which helps on new ones."""
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(96, 96, generator=generator) * torch.logspace(0, -1, 96)
    model = nn.Sequential(nn.Linear(96, 32)).eval()
    x, new = (torch.randn(n, 96, generator=generator) @ mixing for n in (64, 1024))
    spec = QuantSpec(
        w_bits=3, a_bits=8, preset="fast", batch_size=16, first_bits=None, last_bits=None, num_samples=64
    )

    def error():
        module, _ = quantize(model, spec, x.split(16))
        with torch.no_grad():
            return float((module(new) - model(new)).square().mean())

    damped = error()
    monkeypatch.setattr(layer_fit, "_SCARCE", float("inf"))
    assert damped < 0.95 * error()


def test_a_single_batch_does_not_tell_that_samples_are_few(monkeypatch):
    model = nn.Sequential(randomise(nn.Conv2d(4, 6, 3)), nn.ReLU()).eval()
    x = small_inputs(16, 4, 7, 7)
    spec = QuantSpec(w_bits=3, a_bits=8, preset="fast", batch_size=16, first_bits=None, last_bits=None)

    def outputs():
        module, _ = quantize(model, spec, [x])
        with torch.no_grad():
            return module(x)

    first = outputs()
    monkeypatch.setattr(layer_fit, "_SCARCE", float("inf"))
    assert torch.equal(first, outputs())


@pytest.mark.parametrize("high", [6.0, float("inf")])
def test_the_shift_behind_a_clip_minimises_its_weighted_error_and_lowers_the_real_one(high):
    rng = np.random.default_rng(4)
    wanted = rng.normal(1.0, 3.0, (5, 4000))
    outputs = 0.7 * wanted - 0.4 + rng.normal(0.0, 0.3, wanted.shape)  # shrunk and too low
    found = shift_behind_clip(torch.tensor(outputs), torch.tensor(wanted), 0.0, high).numpy()
    mask = ~(((outputs <= 0) & (wanted <= 0)) | ((outputs >= high) & (wanted >= high)))
    clipped = np.clip(wanted, 0.0, high)
    for channel in range(5):
        grid = found[channel] + np.linspace(-0.5, 0.5, 101)[:, None]
        errors = mask[channel] * (clipped[channel] - outputs[channel] - grid) ** 2
        losses = errors.sum(1) + 0.1 * wanted.shape[1] * grid[:, 0] ** 2
        assert losses.argmin() == 50
    before, after = (
        np.square(np.clip(u, 0.0, high) - clipped).mean() for u in (outputs, outputs + found[:, None])
    )
    assert after < 0.8 * before


@pytest.mark.parametrize("kind", ["conv2d", "conv1d", "linear", "linear of tokens"])
def test_outputs_and_bias_of_a_scarce_layer_are_shifted_alike(kind, monkeypatch):
    layers = {
        "conv2d": (nn.Conv2d(4, 6, 3), (32, 4, 7, 7)),
        "conv1d": (nn.Conv1d(4, 6, 3), (32, 4, 9)),
        "linear": (nn.Linear(4, 6), (32, 4)),
        "linear of tokens": (nn.Linear(4, 6), (32, 5, 4)),
    }
    layer, shape = layers[kind]
    model = nn.Sequential(randomise(layer), nn.ReLU()).eval()
    monkeypatch.setattr(layer_fit, "_SCARCE", 0.0)
    seen = {}
    shift_bias = layer_fit._shift_bias

    def spy(node, quant, quantized, *rest):
        before = quant.bias.clone()
        shift_bias(node, quant, quantized, *rest)
        again = quant(quantized.value(node.args[0], slice(0, 32)))
        seen["moved"] = float((quant.bias - before).abs().max())
        torch.testing.assert_close(quantized.values[node], again, rtol=1e-4, atol=1e-5)

    monkeypatch.setattr(layer_fit, "_shift_bias", spy)
    spec = QuantSpec(w_bits=2, a_bits=8, preset="fast", batch_size=8, first_bits=None, last_bits=None)
    quantize(model, spec, small_inputs(*shape).split(8))
    assert seen["moved"] > 0
