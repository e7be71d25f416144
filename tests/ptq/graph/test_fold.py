"""BatchNorm folding."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.graph.fold import fold_batch_norm, fold_factors
from cat_plugin.ptq.graph.trace import trace
from tests.ptq.models import (
    MODELS,
    randomise,
    small_inputs,
)


@pytest.mark.parametrize(("make", "shape"), MODELS)
def test_the_folded_graph_computes_the_model_at_any_batch_size(make, shape):
    model, x = randomise(make()), small_inputs(*shape)
    module = trace(model, x[:1])
    fold_batch_norm(module)
    assert not any("batch_norm" in str(n.target) for n in module.graph.nodes)
    for count in (1, 3, 4):
        with torch.no_grad():
            torch.testing.assert_close(module(x[:count]), model(x[:count]), rtol=1e-4, atol=1e-5)


class _LayerScale(nn.Module):
    """A factor for each channel behind three layers: one that folds, one that others read, one of another axis."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.scales = nn.ParameterList(nn.Parameter(torch.linspace(0.1, 2.0, 6)) for _ in range(3))

    def forward(self, x):
        x = x + self.scales[0] * self.a(x)
        y = self.b(x)
        x = x + y + y * self.scales[1]
        return x + self.c(x) * self.scales[2].reshape(6, 1)


def test_factors_of_channels_are_folded_where_the_layer_has_no_other_reader():
    model, x = _LayerScale(), small_inputs(4, 6, 6)
    module = trace(model, x[:2])
    assert fold_factors(module) == 1
    assert sum("mul" in str(n.target) for n in module.graph.nodes) == 2
    with torch.no_grad():
        torch.testing.assert_close(module(x), model(x))


def test_batch_norm_that_follows_nothing_stays_and_is_reported():
    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(F.relu(self.bn(x))).mean((2, 3))

    model, x = randomise(PreActivation()), small_inputs(16, 3, 8, 8)
    module, report = quantize(model, QuantSpec(w_bits=8, a_bits=8, preset="fast"), x)
    assert any(entry.startswith("bn ") for entry in report.unquantized)
    with torch.no_grad():
        assert float((module(x) - model(x)).abs().max()) < 0.1
