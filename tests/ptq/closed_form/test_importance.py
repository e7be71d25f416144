"""Weights of positions, against gradients in float64 written out."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.closed_form.importance import importance_of_positions
from cat_plugin.ptq.closed_form.moments import measure
from cat_plugin.ptq.graph.insert import insert_quantizers
from cat_plugin.ptq.graph.trace import trace
from cat_plugin.ptq.learned.quality import Quality
from cat_plugin.ptq.rows import Rows
from tests.ptq.models import randomise, small_inputs


class _Weighted(nn.Module):
    """Tokens of which a fixed weighting is read."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 3)
        self.register_buffer("shares", torch.tensor([0.0, 1.0, 2.0, 0.5]))

    def forward(self, x):
        tokens = self.b(torch.relu(self.a(x)))
        return self.head((tokens * self.shares.reshape(-1, 1)).sum(1))


def _prepared(model, x):
    module = trace(model, x[:2])
    return insert_quantizers(module, QuantSpec(preset="fast"))


def test_positions_count_as_much_as_the_results_depend_on_them():
    model, x = randomise(_Weighted()), small_inputs(6, 4, 5)
    prepared = _prepared(model, x)
    module = prepared.module
    generator = torch.Generator().manual_seed(0)
    found = importance_of_positions(module, Rows([x]), Quality.of(module.graph), 4, generator)
    first, second = found.values()
    shares = np.array([0.0, 1.0, 2.0, 0.5]) ** 2
    expected = 0.1 + 0.9 * shares / shares.mean()
    np.testing.assert_allclose(second.numpy(), np.tile(expected, (6, 1)), rtol=1e-4)
    assert first.shape == (6, 4)
    assert torch.allclose(first[:, 0], torch.tensor(0.1))
    torch.testing.assert_close(first.mean(1), torch.ones(6))


def test_probes_have_the_fisher_information_as_their_covariance():
    z = small_inputs(1, 4, seed=5).requires_grad_()
    generator = torch.Generator().manual_seed(1)
    draws = []
    for _ in range(4000):
        total = Quality().curvature_probe(Rows([z]), 2.0, generator)
        draws.append(torch.autograd.grad(total, z)[0][0].double().numpy())
    p = np.exp(z.detach().double().numpy()[0] / 2)
    p /= p.sum()
    np.testing.assert_allclose(
        np.mean([np.outer(r, r) for r in draws], 0), np.diag(p) - np.outer(p, p), atol=0.01
    )


def test_weighted_moments_are_those_of_repeated_positions():
    model, x = randomise(_Weighted()), small_inputs(6, 4, 5)
    layer = _prepared(model, x).layers[0]
    y = model.a(x).detach()
    counts = torch.tensor([1, 3, 0, 2])
    generator = torch.Generator().manual_seed(0)
    weighted = measure(layer, x, y, 1 << 16, 4, generator, counts.float().expand(6, 4))
    repeated = [v.repeat_interleave(counts, 1) for v in (x, y)]
    plain = measure(layer, *repeated, 1 << 16, 4, generator)
    for name in ("h", "c", "mean_x", "mean_y"):
        torch.testing.assert_close(getattr(weighted, name), getattr(plain, name), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weighted.halves[1].h, plain.halves[1].h, rtol=1e-4, atol=1e-5)


def test_what_is_read_is_fitted_best():
    model, x = randomise(_Weighted()), small_inputs(64, 4, 5)
    errors = {}
    for weighted in (False, True):
        spec = QuantSpec(
            w_bits=2, a_bits=3, preset="fast", first_bits=None, last_bits=None, position_weights=weighted
        )
        module, _ = quantize(model, spec, x)
        with torch.no_grad():
            errors[weighted] = float((module(x) - model(x)).square().mean())
    assert errors[True] < errors[False]


def test_bf16_changes_weights_by_its_rounding_only():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(64, 64), nn.Linear(64, 96), nn.Linear(96, 3)

        def forward(self, x):
            tokens = self.b(torch.relu(self.a(x)))
            return self.head((tokens * torch.linspace(0.2, 2.0, 5).reshape(-1, 1)).sum(1))

    x = small_inputs(6, 5, 64)
    module = _prepared(randomise(Wide()), x).module
    exact, rounded = (
        importance_of_positions(
            module, Rows([x]), Quality.of(module.graph), 4, torch.Generator().manual_seed(0), bf16=bf16
        )
        for bf16 in (False, True)
    )
    for one, other in zip(exact.values(), rounded.values(), strict=True):
        assert not torch.equal(one, other)
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.01)
