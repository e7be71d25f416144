"""Ranges of least squared error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cat_plugin.ptq.quantizers import observers
from cat_plugin.ptq.quantizers.observers import (
    search_activation_range,
    search_channel_ranges,
    search_weight_range,
)
from tests.ptq.models import small_inputs


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


def test_ranges_of_channels_are_nearly_the_best_of_all():
    values = np.random.default_rng(3).normal(size=(400, 4)) * [1.0, 5.0, 0.2, 1.0] + [0.0, 3.0, 0.0, -2.0]
    values[:, 3] = np.where(values[:, 3] > 0, values[:, 3] * 6, 0.1 * values[:, 3])  # a long tail on one side
    found = search_channel_ranges(torch.from_numpy(values).float(), 3).double().numpy()

    def error(x, low, high):
        scale = (high - low) / 7
        return ((np.clip(np.round((x - low) / scale), 0, 7) * scale + low - x) ** 2).mean()

    for channel, x in enumerate(values.T):
        shares = np.linspace(0.05, 1.0, 60)
        ends = [
            (m + a * (x.min() - m), m + b * (x.max() - m)) for m in [x.mean()] for a in shares for b in shares
        ]
        best = min(error(x, low, high) for low, high in ends)
        assert error(x, *found[:, channel]) < 1.1 * best


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_sums_between_levels_choose_the_grid_that_rounding_with_each_does(bits, monkeypatch):
    weight = small_inputs(24, 600, seed=5) * torch.linspace(0.1, 4.0, 24).unsqueeze(1) + 0.3
    found = search_weight_range(weight, bits, False)
    fast = observers._errors_between_levels
    monkeypatch.setattr(observers, "_errors_between_levels", observers._errors_of_grids)
    for one, other in zip(found, search_weight_range(weight, bits, False), strict=True):
        assert torch.equal(one, other)
    scales, zeros = torch.rand(24, 9).double() + 0.1, torch.zeros(24, 9).double()
    ends = -(1 << bits - 1), (1 << bits - 1) - 1
    expected = observers._errors_of_grids(weight.double(), scales, zeros, *ends)
    torch.testing.assert_close(fast(weight.double(), scales, zeros, *ends), expected, rtol=1e-9, atol=0)
