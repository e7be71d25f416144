"""Grids of fitted levels against an exhaustive search, and what is kept and written of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.fitted import put_back, tensors_of
from cat_plugin.ptq.quantizers.logarithmic import LogQuantizer, search_levels
from cat_plugin.ptq.quantizers.observers import calibrate
from cat_plugin.ptq.quantizers.tables import FittedQuantizer, fit_levels
from tests.zoo import ZOO


def _shares(seed: int = 0, count: int = 400) -> torch.Tensor:
    return torch.softmax(3 * torch.randn(count, 20, generator=torch.Generator().manual_seed(seed)), 1)


def _calibrated(x: torch.Tensor, bits: int = 4) -> FittedQuantizer:
    quantizer = FittedQuantizer(bits)
    calibrate(quantizer, x, False, torch.Generator().manual_seed(0))
    return quantizer


def _error(x: np.ndarray, levels: np.ndarray) -> float:
    return float((np.abs(x[:, None] - levels).min(1) ** 2).sum())


@pytest.mark.parametrize("seed", range(4))
def test_levels_are_the_best_of_all_ways_to_part_the_values(seed):
    """With zero and two levels more, the sorted values are parted at two places: all are tried in float64."""
    x = np.sort(np.random.default_rng(seed).gamma(0.4, 1.0, 40).astype(np.float32)).astype(np.float64)
    best = np.inf
    for a, b in itertools.combinations(range(len(x)), 2):
        parts = (x[a:b], x[b:])
        best = min(best, float((x[:a] ** 2).sum() + sum(((p - p.mean()) ** 2).sum() for p in parts)))
    starts = itertools.product(np.linspace(0.02, 0.5, 8), np.linspace(0.5, 1.0, 6))
    found = [fit_levels(torch.from_numpy(x), torch.tensor([0.0, *ends]) * x.max()) for ends in starts]
    assert min(_error(x, levels.double().numpy()) for levels in found) <= best * (1 + 1e-4)


def test_fitted_levels_err_less_than_a_logarithmic_grid_and_leave_zero_where_it_is():
    x, other = _shares(), _shares(1)
    quantizer, logarithmic = _calibrated(x), LogQuantizer(4)
    logarithmic.set_range(*search_levels(x.flatten(), 4))
    for values, share in ((x, 0.8), (other, 0.85)):
        errors = [float((q(values) - values).square().mean()) for q in (quantizer, logarithmic)]
        assert errors[0] < share * errors[1]
    assert float(quantizer(torch.zeros(3)).abs().max()) == 0.0
    assert len(quantizer(x).unique()) == 16


def test_values_go_to_the_nearest_level_and_gradients_pass():
    quantizer, x = _calibrated(_shares()), _shares(2).flatten().requires_grad_()
    given = np.abs(quantizer(x).detach().double().numpy() - x.detach().double().numpy())
    levels = quantizer.levels.double().numpy()
    np.testing.assert_allclose(given, np.abs(x.detach().double().numpy()[:, None] - levels).min(1), atol=1e-7)
    (gradient,) = torch.autograd.grad((quantizer(x) * 3).sum(), x)
    assert torch.equal(gradient, torch.full_like(x, 3.0))


def test_a_constant_has_levels_too():
    quantizer = _calibrated(torch.full((64, 4), 0.25), 2)
    assert torch.equal(quantizer(torch.full((5,), 0.25)), torch.full((5,), 0.25))
    assert bool((quantizer.levels.diff() >= 0).all())


def test_levels_are_kept_and_put_back():
    class Held(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q = FittedQuantizer(4)

    first, second = Held(), Held()
    first.q.set_levels(_calibrated(_shares()).levels)
    put_back(second, tensors_of(first, ()))
    assert second.q.ready
    assert torch.equal(first.q.levels, second.q.levels)


def test_a_network_with_attention_below_eight_bits_is_written_with_tables():
    network = ZOO["vit"]
    model, x = network.build(), network.inputs(16)
    spec = QuantSpec(w_bits=8, a_bits=8, attention_bits=4, preset="fast", num_samples=16)
    module, report = quantize(model, spec, x)
    targets = [str(node.target) for node in module.graph.nodes]
    assert targets.count("aten.bucketize.Tensor") == targets.count("aten.softmax.int") == 2
    assert not report.unquantized
    tables = [buffer for name, buffer in module.named_buffers() if name.endswith("levels")]
    assert [len(table) for table in tables] == [16, 16]
    with torch.no_grad():
        difference = (module(x) - model(x)).abs().max() / model(x).abs().max()
    assert float(difference) < 0.15
    uniform, _ = quantize(model, QuantSpec(w_bits=8, a_bits=8, preset="fast", num_samples=16), x)
    assert "aten.bucketize.Tensor" not in [str(node.target) for node in uniform.graph.nodes]
