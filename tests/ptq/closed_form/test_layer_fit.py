"""One layer fitted: shortcuts, scarce samples, a number added."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.closed_form import layer_fit
from tests.ptq.models import randomise, small_inputs
from tests.zoo import ZOO


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


def test_a_number_added_to_a_layer_is_no_shortcut():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x):
            return self.fc(x) + 1.0

    model, x = randomise(Shifted()), small_inputs(32, 6)
    module, _ = quantize(model, QuantSpec(w_bits=8, a_bits=8, preset="fast", batch_size=8), x)
    with torch.no_grad():
        assert float((module(x) - model(x)).abs().max()) < 0.1


def test_vocabularies_of_many_weights_are_rounded_to_nearest(monkeypatch):
    network = ZOO["llama"]
    model, x = network.build(), network.inputs(16)
    spec = QuantSpec(w_bits=3, weight_only=True, preset="fast", batch_size=4)
    names = {}
    for limit in (1 << 24, 700):  # the output layer has 800 weights, the next largest 384
        monkeypatch.setattr("cat_plugin.ptq.closed_form.layer_fit._VOCABULARY", limit)
        module, report = quantize(model, spec, x)
        names[limit] = dict(module.named_buffers())
        assert report.layers[-1].w_bits == 8
    head = report.layers[-1].name
    stored = [names[700][f"{head}.{part}"] for part in ("weight", "weight_scale", "weight_zero_point")]
    nearest = (model.embedding.weight / stored[1][:, None]).round() + stored[2][:, None]
    assert torch.equal(stored[0], nearest.clamp(-128, 127).to(torch.int8))
    assert f"{head}.bias" not in names[700]
    assert f"{head}.bias" in names[1 << 24]
    assert all(torch.equal(v, names[1 << 24][k]) for k, v in names[700].items() if k.startswith("blocks"))
