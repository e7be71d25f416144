"""Scales and shifts in closed form, against their formulas, and what they gain."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cat_plugin.errors import CATError
from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.graph.trace import trace
from cat_plugin.ptq.rows import Rows
from cat_plugin.ptq.transforms.smoothing.places import find_places
from cat_plugin.ptq.transforms.smoothing.ranges import measure_ranges
from cat_plugin.ptq.transforms.smoothing.smoothing import Smoothing
from cat_plugin.ptq.transforms.smoothing.starts import STARTS, searched_reach
from cat_plugin.ptq.transforms.smoothing.strength import best_strength, output_errors, powered
from tests.zoo import ZOO


class Outliers(nn.Module):
    """A norm that makes some channels fifty times as large as others, as those of transformers do, and a gated network."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 5)
        with torch.no_grad():
            self.norm.weight[3], self.norm.weight[7], self.norm.bias[7] = 50.0, 20.0, 30.0
            self.up.weight[:, 3] /= 50
            self.up.weight[:, 7] /= 20

    def forward(self, x):
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.head(x.mean(1))


@pytest.fixture
def outliers():
    torch.manual_seed(0)
    return Outliers().eval(), torch.randn(64, 9, 16)


def test_ranges_are_those_of_the_values(outliers):
    model, x = outliers
    module = trace(model, x)
    places = find_places(module)
    assert [place.kind for place in places] == ["norm", "linear"]
    ranges, hidden = measure_ranges(module, places, Rows([x]), 16)
    y = model.norm(x).detach().reshape(-1, 16)
    torch.testing.assert_close(ranges.low, y.amin(0))
    torch.testing.assert_close(ranges.high, y.amax(0))
    torch.testing.assert_close(ranges.weight, model.up.weight.detach().abs().amax(0))
    middle = None
    for part in model.norm(x).detach().split(16):
        rows = part.reshape(-1, 16)
        now = (rows.amin(0) + rows.amax(0)) / 2
        middle = now if middle is None else 0.99 * middle + 0.01 * now
    torch.testing.assert_close(ranges.middle, middle)
    assert float(hidden.low.min()) == 0.0


def test_scales_are_those_of_the_papers(outliers):
    model, x = outliers
    module = trace(model, x)
    (norm, hidden) = find_places(module)
    ranges, behind = measure_ranges(module, [norm, hidden], Rows([x]), 64)
    m, w = torch.maximum(ranges.high, -ranges.low).double(), ranges.weight.double()
    scales, shifts = STARTS["smoothquant"].choose(norm, ranges, 0.7)
    assert shifts is None
    torch.testing.assert_close(scales.double(), m**0.7 / w**0.3, rtol=1e-5, atol=0)
    scales, shifts = STARTS["lrquant"].choose(norm, ranges, 0.7)
    assert shifts is ranges.middle
    m = torch.maximum(ranges.high - shifts, shifts - ranges.low).double()
    torch.testing.assert_close(scales.double(), m / torch.log2(2 + m), rtol=1e-5, atol=0)
    scales, shifts = STARTS["repq"].choose(norm, ranges, 0.5)
    half = (ranges.clipped_high - ranges.clipped_low).double() / 2
    torch.testing.assert_close(scales.double(), half / half.mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(shifts, (ranges.clipped_high + ranges.clipped_low) / 2)
    assert STARTS["repq"].choose(hidden, behind, 0.5)[1] is None
    assert STARTS["lrquant"].choose(hidden, behind, 0.5)[1] is None  # ReLU keeps zero where it is


def test_queries_and_keys_meet_in_the_middle():
    network = ZOO["encoder"]
    model, x = network.build(), network.inputs(8)
    with torch.no_grad():
        model.layers[0].key.weight *= 9.0
        model.layers[0].key.bias *= 9.0
    module = trace(model, x)
    places = find_places(module)
    Smoothing().fold(module, Rows([x]), QuantSpec(smoothing="lrquant"), torch.Generator())
    product = next(place for place in places if place.kind == "product")
    (after,) = measure_ranges(module, [product], Rows([x]), 8)
    torch.testing.assert_close(after.ratio, torch.ones(product.count), rtol=1e-3, atol=1e-3)


def _error(model, x, **options):
    spec = QuantSpec(w_bits=8, a_bits=4, preset="fast", first_bits=None, num_samples=64, **options)
    module, _ = quantize(model, spec, x)
    with torch.no_grad():
        return float((module(x) - model(x)).square().mean() / model(x).var())


@pytest.mark.parametrize("method", STARTS)
def test_outliers_cost_less_once_they_are_smoothed(outliers, method):
    model, x = outliers
    before = _error(model, x, compensation=False)
    assert _error(model, x, compensation=False, smoothing=method) < 0.6 * before


@pytest.mark.parametrize(
    ("name", "method"),
    [("vit", "smoothquant"), ("swin", "omniquant"), ("mixer", "repq"), ("llama", "lrquant"), ("encoder", "lrquant")],
)  # fmt: skip
def test_networks_are_quantized_behind_every_method(name, method):
    network = ZOO[name]
    model, x = network.build(), network.inputs(16)
    spec = QuantSpec(w_bits=8, a_bits=8, attention_bits=8, preset="fast", smoothing=method, num_samples=16)
    module, _ = quantize(model, spec, x)
    with torch.no_grad():
        difference = (module(x) - model(x)).abs().max() / model(x).abs().max()
    assert float(difference) < 0.08


def test_the_names_of_the_methods_are_those_of_the_option():
    for name in STARTS:
        assert QuantSpec(smoothing=name).smoothing == name
    with pytest.raises(CATError, match=r"smoothing.*lrquant"):
        QuantSpec(smoothing="lrqant")


class _Behind(nn.Module):
    """GELU whose channels differ, read by a layer."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        with torch.no_grad():
            self.up.weight *= torch.logspace(-1, 1, 16).unsqueeze(1)
            self.down.weight /= torch.logspace(-1, 1, 16)

    def forward(self, x):
        return self.down(torch.nn.functional.gelu(self.up(self.norm(x)))).mean(1)


def test_channels_behind_gelu_are_scaled_and_shifted_in_float():
    model, x = _Behind().eval(), torch.randn(64, 6, 8, generator=torch.Generator().manual_seed(2))
    module = trace(model, x[:2])
    Smoothing().fold(module, Rows([x]), QuantSpec(smoothing="searched"), torch.Generator())
    assert sum("addcmul" in str(node.target) for node in module.graph.nodes) == 1
    with torch.no_grad():
        torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-5)
    errors = {
        method: _error(model, x, smoothing=method, compensation=False, last_bits=None)
        for method in (None, "searched")
    }
    assert errors["searched"] < 0.5 * errors[None]


def test_the_searched_strength_is_the_best_of_those_tried():
    model, x = _Behind().eval(), torch.randn(64, 6, 8, generator=torch.Generator().manual_seed(2))
    module = trace(model, x[:2])
    (place,) = [p for p in find_places(module) if p.kind == "norm"]
    (ranges,) = measure_ranges(module, [place], Rows([x]), 64, 4)
    reach, shifts = searched_reach(place, ranges)
    given = (module, place, ranges.samples)
    found, least = best_strength(*given, reach, shifts, (4, 4))
    losses = {}
    for strength in (0.0, 0.25, 0.5, 0.75, 1.0):
        activation, weight = output_errors(*given, powered(reach, strength), shifts, (4, 4))
        losses[strength] = activation + 0.5 * weight
    assert least == losses[found] == min(losses.values())
