"""The bias that restores means, and that of least error behind a clip."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cat_plugin.ptq.closed_form.bias_correction import corrected_bias, shift_behind_clip
from cat_plugin.ptq.closed_form.moments import measure
from cat_plugin.ptq.quantizers.observers import search_weight_range
from tests.ptq.closed_form.layers import LAYERS, make_layer
from tests.ptq.models import small_inputs


@pytest.mark.parametrize("case", LAYERS)
def test_corrected_bias_restores_the_mean_of_every_channel(case):
    layer, _ = make_layer(case, bits=2)
    x = small_inputs(40, *case[2][1:], seed=8).abs()
    y = layer.compute(x, layer.weight, layer.bias)
    x_q = x + 0.3
    layer.scale, layer.zero_point = search_weight_range(layer.weight, 2, symmetric=True)
    layer.q_weight = layer.round_to_nearest()
    layer.bias = corrected_bias(layer, measure(layer, x_q, y, 1 << 30, 8, torch.Generator()))
    axes = [d for d in range(y.ndim) if d != (y.ndim - 1 if layer.kind == "linear" else 1)]
    torch.testing.assert_close(layer(x_q).mean(axes), y.mean(axes), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("high", [6.0, float("inf")])
def test_the_shift_behind_a_clip_minimises_its_weighted_error_and_lowers_the_real_one(high):
    rng = np.random.default_rng(4)
    wanted = rng.normal(1.0, 3.0, (5, 4000))
    outputs = 0.7 * wanted - 0.4 + rng.normal(0.0, 0.3, wanted.shape)  # shrunk and too low
    both = (torch.tensor(outputs), torch.tensor(wanted))
    parts = zip(*(torch.split(values, 1500, 1) for values in both), strict=True)
    found = shift_behind_clip(parts, 0.0, high).numpy()
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
