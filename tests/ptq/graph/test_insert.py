"""What stays in float, and what is quantized on request."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cat_plugin.batches import ModelCall
from cat_plugin.ptq import QuantSpec, quantize
from tests.ptq.models import (
    Attention,
    SmallResNet,
    randomise,
    small_inputs,
)


def test_what_stays_in_float_is_reported():
    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.fc = nn.ConvTranspose2d(3, 4, 2, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(F.relu(self.up(x)).mean((2, 3)))

    _, report = quantize(randomise(Up()), QuantSpec(preset="fast"), small_inputs(8, 3, 4, 4))
    assert any("conv_transpose2d" in entry for entry in report.unquantized)
    assert [layer.name for layer in report.layers] == ["fc"]


def test_attention_inputs_are_quantized_unless_they_are_to_stay_in_float():
    model, x = randomise(Attention("matmul")), small_inputs(16, 3, 16, 16)
    _, plain = quantize(model, QuantSpec(w_bits=8, a_bits=8, preset="fast", attention_bits=None), x)
    assert sum("matmul" in entry for entry in plain.unquantized) == 2
    module, asked = quantize(model, QuantSpec(w_bits=8, a_bits=8, preset="fast"), x)
    assert asked.unquantized == []
    for node in module.graph.nodes:
        if "matmul" in str(node.target):
            assert all("dequantize_per_tensor" in str(a.target) for a in node.args)


class _PreNorm(nn.Module):
    """A stream that norms read, and the product of two layers that a layer reads."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 8), nn.LayerNorm(8)
        self.gate, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.first(x)
        y = self.norm(x + 1.5 * x)
        y = self.down(F.silu(self.gate(y)) * self.up(y))
        return self.norm(torch.cat([x, y + x], 1))


def test_what_a_norm_reads_stays_in_float():
    x = small_inputs(16, 3, 4)
    module, _ = quantize(randomise(_PreNorm()), QuantSpec(preset="fast"), x)
    joined = {}
    for node in module.graph.nodes:
        if str(node.target) in ("aten.add.Tensor", "aten.cat.default", "aten.mul.Tensor"):
            operands = [n for n in node.all_input_nodes if n.op != "get_attr"]
            joined.setdefault(str(node.target), []).append(["dequantize" in str(n.target) for n in operands])
    for target in ("aten.add.Tensor", "aten.cat.default"):
        assert not any(any(flags) for flags in joined[target])
    assert joined["aten.mul.Tensor"] == [[False], [True, True]]


def test_weights_alone_are_quantized_where_that_is_asked_for():
    model, x = randomise(SmallResNet()), small_inputs(32, 3, 12, 12)
    spec = QuantSpec(
        w_bits=4, weight_only=True, attention_bits=8, preset="balanced", unit_steps=8, refinement_steps=0
    )
    quantized, report = quantize(model, spec, x)
    targets = [str(n.target) for n in quantized.graph.nodes if n.op == "call_function"]
    assert not [t for t in targets if "per_tensor" in t]
    assert len([t for t in targets if "dequantize_per_channel" in t]) == len(report.layers) == 6
    assert {layer.a_bits for layer in report.layers} == {32}
    assert len(report.units) >= 2  # blocks are found without quantizers to cut at


def test_a_single_number_that_the_batch_gives_is_quantized_as_one():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            y = self.conv(x)
            return y.mean((2, 3)) + y.mean() * 0.1

    model, x = randomise(Scaled()), small_inputs(8, 3, 4, 4)
    quantized, _ = quantize(model, QuantSpec(w_bits=8, a_bits=8, preset="fast"), x)
    with torch.no_grad():
        expected = model(x)
        assert float((quantized(x) - expected).abs().max() / expected.abs().max()) < 0.05


class _Heat(nn.Module):
    """Where a value is the largest around, asked in one of several ways."""

    def __init__(self, ask):
        super().__init__()
        self.heat, self.ask = nn.Conv2d(3, 2, 3, padding=1), ask

    def forward(self, x):
        heat = self.heat(x).sigmoid()
        return self.ask(heat).float() * heat


PEAKS = {
    "equal": lambda y: F.max_pool2d(y, 3, 1, 1) == y,
    "least": lambda y: -F.max_pool2d(-y, 3, 1, 1) == y,
    "not-below": lambda y: y >= F.max_pool2d(y, 3, 1, 1),
    "no-difference": lambda y: (F.max_pool2d(y, 3, 1, 1) - y).abs() < 1e-6,
    "of-a-block": lambda y: F.interpolate(F.max_pool2d(y, 2), scale_factor=2) == y,
}


@pytest.mark.parametrize("name", PEAKS)
def test_what_is_compared_with_what_it_was_selected_from_is_not_rounded_on_one_side(name):
    model, x = randomise(_Heat(PEAKS[name])), small_inputs(8, 3, 8, 8)
    quantized, _ = quantize(model, QuantSpec(w_bits=8, a_bits=8, preset="fast"), x)
    with torch.no_grad():
        found, expected = quantized(x) > 0, model(x) > 0
    assert expected.sum() > 20
    assert (found & expected).sum() > 0.9 * expected.sum()


class _Times(nn.Module):
    """An image at one of a thousand steps, whose number becomes sines."""

    def __init__(self):
        super().__init__()
        self.conv, self.time, self.out = nn.Conv2d(3, 8, 1), nn.Linear(16, 8), nn.Linear(8, 4)
        self.register_buffer("frequencies", torch.exp(-torch.arange(8.0)))

    def forward(self, x, step):
        angle = step.unsqueeze(1).float() * self.frequencies
        told = self.time(torch.cat([angle.cos(), angle.sin()], 1))
        return self.out(F.silu(self.conv(x).mean((2, 3)) + told))


class _Places(nn.Module):
    """Degrees north and east, which the model itself normalises."""

    def __init__(self):
        super().__init__()
        self.first, self.out = nn.Linear(2, 16), nn.Linear(16, 3)
        self.register_buffer("centre", torch.tensor([52.5, 13.4]))

    def forward(self, place):
        return self.out(F.relu(self.first((place - self.centre) / 0.06)))


def _places(rows):
    return 0.06 * small_inputs(rows, 2) + torch.tensor([52.5, 13.4])


@pytest.mark.parametrize(
    ("model", "given"),
    [(_Times, (small_inputs(64, 3, 4, 4), torch.arange(64) * 15 + 7)), (_Places, (_places(64),))],
)
def test_inputs_are_made_ready_and_whole_numbers_reckoned_with_before_anything_is_rounded(model, given):
    network = randomise(model())
    quantized, _ = quantize(network, QuantSpec(w_bits=8, a_bits=8, preset="fast"), [ModelCall(given)])
    with torch.no_grad():
        found, expected = quantized(*given), network(*given)
    assert float((found - expected).norm() / expected.norm()) < 0.03


def test_values_in_small_units_have_levels_too():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            y = self.conv(x) * 1e-12
            return (y[:, :2] + y[:, 2:]).mean((2, 3)) * 1e12

    model, x = randomise(Small()), small_inputs(16, 3, 4, 4)
    quantized, _ = quantize(model, QuantSpec(w_bits=8, a_bits=8, preset="fast"), x)
    with torch.no_grad():
        expected = model(x)
        assert float((quantized(x) - expected).norm() / expected.norm()) < 0.03


def test_inputs_far_from_zero_are_told_of():
    network = randomise(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    kelvins = 290 + 2 * small_inputs(64, 4)
    spec = QuantSpec(w_bits=8, a_bits=8, preset="fast")
    _, report = quantize(network, spec, kelvins)
    assert any("lies around 290 and spreads by 2" in note for note in report.notes)
    _, report = quantize(network, spec, kelvins - 290)
    assert not any("lies around" in note for note in report.notes)
