"""Equalization: exact in full precision, and less noise when quantized."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.graph.insert import insert_quantizers
from cat_plugin.ptq.graph.ops import WEIGHTED, is_call, weight_of
from cat_plugin.ptq.graph.trace import trace
from cat_plugin.ptq.learned.soft_unit import run_float
from cat_plugin.ptq.quantizers.observers import search_activation_range, search_weight_range
from cat_plugin.ptq.rows import Rows
from cat_plugin.ptq.transforms.channels import gains as channel_gains
from cat_plugin.ptq.transforms.channels.sampler import ChannelSampler
from cat_plugin.ptq.transforms.equalization import Ceiling, Equalization, has_depthwise
from tests.ptq.models import (
    GroupedNet,
    SmallResNet,
    Uneven,
    randomise,
    small_inputs,
)


def test_what_is_sampled_does_not_depend_on_the_rows_run_at_a_time():
    module, x = trace(randomise(SmallResNet()), small_inputs(2, 3, 12, 12)), small_inputs(7, 3, 12, 12)
    watched = {n for n in module.graph.nodes if is_call(n, WEIGHTED)}
    found = []
    for piece in (7, 3, 1):
        sampler = ChannelSampler(module, watched, 40, torch.Generator().manual_seed(1))
        sampler.run_batch(Rows([x]), piece)
        found.append(sampler)
    for other in found[1:]:
        for node in watched:
            (expected,), (values,) = found[0].samples[node], other.samples[node]
            torch.testing.assert_close(values, expected)
            ends = [torch.cat(each.extremes[node], 1) for each in (found[0], other)]
            torch.testing.assert_close(ends[1].amax(1), ends[0].amax(1))


def _uneven():
    model, x = randomise(Uneven()), small_inputs(32, 3, 6, 6)
    model.a.weight.data *= torch.logspace(-1, 0.7, 6).reshape(-1, 1, 1, 1)
    model.a.bias.data += 0.1
    module = trace(model, x)
    weights = [getattr(module, n.args[1].target).clone() for n in module.graph.nodes if is_call(n, WEIGHTED)]
    spec = QuantSpec(w_bits=4, a_bits=4, depthwise_bits=None, batch_size=8)
    finish = Equalization().fold(module, Rows([x]), spec, torch.Generator().manual_seed(0))
    after = [getattr(module, n.args[1].target) for n in module.graph.nodes if is_call(n, WEIGHTED)]
    return model, x, module, finish, weights, after


def test_equalization_leaves_the_function_and_evens_the_channels():
    model, x, module, finish, before, after = _uneven()
    first = next(n for n in module.graph.nodes if is_call(n, WEIGHTED))
    inside = fx.Interpreter(module, garbage_collect_values=False)
    inside.run(x)
    prepared = insert_quantizers(module, QuantSpec()).module
    finish(prepared)
    source = next(n for n in prepared.graph.nodes if n.op == "placeholder")
    nodes = [n for n in prepared.graph.nodes if n.op in ("call_function", "call_module")]
    with torch.no_grad():
        torch.testing.assert_close(
            run_float(prepared, nodes, source, x, nodes[-1]), model(x), rtol=1e-4, atol=1e-5
        )
        original = F.relu6(model.a(x))
    # a depthwise reader: every channel now rounds with the relative error of its own best range
    gains = (after[0] / before[0]).flatten(1)[:, 0]
    assert float(gains.min()) == 1.0
    assert float(gains.max()) > 3.0
    equalized = inside.env[first].clamp(0.0, 6.0)

    def error(y):
        grid = search_activation_range(y.flatten(), 4, False)
        rounded = ((y / grid[0]).round().clamp(0, 15)) * grid[0]
        channels = y.transpose(0, 1).flatten(1)
        return ((rounded - y).transpose(0, 1).flatten(1).square().mean(1) / channels.square().mean(1)).max()

    assert float(error(equalized)) < 0.2 * float(error(original))


def _rounded_output_error(values, weight, gains, w_bits, a_bits, top):
    """Mean squared error at a dense layer's outputs with its weights and inputs rounded for real, in float64."""
    x, w, gains = values.double(), weight.double(), gains.double()
    scaled = (x * gains.unsqueeze(1)).clamp(max=top)
    step, _, _ = search_activation_range(scaled.flatten(), a_bits, False)
    rounded = (scaled / step).round().clamp(0, 2**a_bits - 1) * step
    scale, zero = (v.double().unsqueeze(1) for v in search_weight_range(w / gains, w_bits, False))
    low, high = -(2 ** (w_bits - 1)), 2 ** (w_bits - 1) - 1
    integers = ((w / gains / scale).round() + zero).clamp(low, high)
    error = (integers - zero) * scale @ rounded - w @ x.clamp(max=top)
    return float((error - error.mean(1, keepdim=True)).square().mean())


def test_gains_before_a_dense_layer_even_its_columns_as_far_as_relu6_allows():
    generator = torch.Generator().manual_seed(2)
    channels, top = 24, 6.0
    values = torch.rand(channels, 2048, generator=generator) * torch.linspace(1.0, 7.0, channels).unsqueeze(1)
    weight = torch.randn(16, channels, generator=generator) * torch.logspace(0.5, -0.5, channels)
    seen = values.clamp(max=top)
    gains = channel_gains.gains_of(values, seen.var(1), seen.amax(1), 255, weight, 4, top)
    assert float((gains * seen.amax(1)).max()) <= top * 1.001  # nothing is cut earlier than it was
    error = _rounded_output_error(values, weight, gains, 4, 8, top)
    none = _rounded_output_error(values, weight, torch.ones(channels), 4, 8, top)
    assert error < 0.7 * none
    at_8_bits = channel_gains.gains_of(values, seen.var(1), seen.amax(1), 15, weight, 8, top)
    assert _rounded_output_error(values, weight, at_8_bits, 8, 4, top) < 1.05 * _rounded_output_error(
        values, weight, torch.ones(channels), 8, 4, top
    )


def test_modelled_activation_noise_is_the_error_of_rounding_and_cutting():
    generator = torch.Generator().manual_seed(3)
    values, gains = torch.rand(5, 128, generator=generator) * 8, torch.tensor([0.25, 0.5, 0.7, 0.8, 1.0])
    importance = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0])
    x, g = values.double().numpy(), gains.double().numpy()[:, None]
    scaled = np.minimum(x * g, 6.0)
    errors = []
    for fraction in (0.3, 0.45, 0.6, 0.8, 1.0):
        step = fraction * scaled.max() / 15
        rounded = np.minimum(np.round(scaled / step), 15) * step / g
        squares = ((rounded - np.minimum(x, 6.0)) ** 2).mean(1)
        errors.append(float((squares * importance.double().numpy()).sum()))
    found = channel_gains._activation_noise(values, gains, 15, 6.0, importance)
    assert found == pytest.approx(min(errors), rel=1e-3)


def test_linear_layers_are_equalized_too():
    model, x = randomise(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 5))), small_inputs(32, 8)
    spec = QuantSpec(w_bits=8, a_bits=8, preset="fast", batch_size=8, equalization=True)
    module, _ = quantize(model, spec, x)
    with torch.no_grad():
        torch.testing.assert_close(module(x), model(x), rtol=0.02, atol=0.05)


def test_equalization_reaches_pairs_with_relu_or_nothing_between_and_stops_at_other_functions():
    _, _, module, finish, before, after = _uneven()
    scaled = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert scaled[0]
    assert scaled[1]
    assert not scaled[4]  # SiLU and the mean stand before the last layer
    finish(module)
    assert sum(isinstance(child, Ceiling) for child in module.children()) == 2  # ReLU needs none


def test_a_quantized_model_with_equalization_keeps_relu6_and_the_function():
    model, x, *_ = _uneven()
    module, report = quantize(model, QuantSpec(w_bits=8, a_bits=8, preset="fast", batch_size=8), x)
    names = [str(n.target) for n in module.graph.nodes]
    assert names.count("aten.relu6.default") == 2
    assert report.unquantized == []
    with torch.no_grad():
        y, z = model(x), module(x)
    assert float((y - z).square().mean() / y.square().mean()) < 1e-3


def test_values_that_full_precision_clips_and_the_quantized_model_does_not_are_no_fault():
    model, x = randomise(Uneven()), 4 * small_inputs(16, 3, 6, 6)
    module, _ = quantize(model, QuantSpec(w_bits=4, a_bits=4, preset="fast", batch_size=8), x)
    assert [str(n.target) for n in module.graph.nodes].count("aten.relu6.default") == 2


def test_dead_channels_do_equalization_no_harm():
    model, x = randomise(Uneven()), small_inputs(16, 3, 6, 6)
    model.a.weight.data[2], model.a.bias.data[2] = 0, -1.0  # nothing comes through ReLU6
    model.b.weight.data[4], model.b.bias.data[4] = 0, 0
    model.c.weight.data[:], model.c.bias.data[:] = 0, 0.5  # a constant tensor
    module, _ = quantize(
        model, QuantSpec(w_bits=8, a_bits=8, preset="fast", batch_size=8, equalization=True), x
    )
    with torch.no_grad():
        torch.testing.assert_close(module(x), model(x), rtol=0.02, atol=0.02)
    low, _ = quantize(model, QuantSpec(w_bits=2, a_bits=2, preset="fast", batch_size=8), x)
    assert torch.isfinite(low(x)).all()


def test_equalization_is_for_depthwise_models_unless_asked_for():
    for make, shape, expected in ((GroupedNet, (4, 4, 8, 8), True), (SmallResNet, (4, 3, 12, 12), False)):
        module = trace(randomise(make()), small_inputs(*shape))
        assert has_depthwise(module) is expected
        for w_bits, a_bits in ((8, 7), (7, 8), (4, 4)):
            assert Equalization().applies(module, QuantSpec(w_bits=w_bits, a_bits=a_bits)) is expected
        assert not Equalization().applies(module, QuantSpec(w_bits=8, a_bits=8))
        assert Equalization().applies(module, QuantSpec(w_bits=8, a_bits=8, equalization=True))


def test_only_channels_of_less_than_8_bits_are_scaled():
    model, x = randomise(Uneven()), small_inputs(32, 3, 6, 6)
    spread = torch.logspace(-2, 0, 6)  # what the third layer, a dense one, reads is worth scaling
    model.b.weight.data *= spread.reshape(-1, 1, 1, 1)
    model.b.bias.data *= spread
    model.c.weight.data /= spread.reshape(1, -1, 1, 1)
    changed = {}
    for bits, asked in ((8, None), (8, True), (None, None)):
        module = trace(model, x)
        layers = [n for n in module.graph.nodes if is_call(n, WEIGHTED)]
        before = [weight_of(module, n).clone() for n in layers]
        spec = QuantSpec(w_bits=4, a_bits=4, depthwise_bits=bits, equalization=asked, batch_size=8)
        Equalization().fold(module, Rows([x]), spec, torch.Generator().manual_seed(0))
        after = [weight_of(module, n) for n in layers]
        changed[bits, asked] = [not torch.equal(a, b) for a, b in zip(after, before, strict=True)]
    # the second layer is depthwise and alone reads the first
    assert not changed[8, None][0]
    assert any(changed[8, None][1:])
    assert changed[8, True][0]
    assert changed[None, None][0]


def test_8_bit_activations_are_not_clipped_by_what_few_inputs_show():
    """Channels made to fit the calibration data would be clipped where other inputs are larger: 8 bits do without."""
    model, x = randomise(Uneven()), small_inputs(256, 3, 6, 6)
    module, _ = quantize(model, QuantSpec(w_bits=8, a_bits=8, preset="fast"), x[:16])
    scaled, _ = quantize(model, QuantSpec(w_bits=8, a_bits=8, preset="fast", equalization=True), x[:16])
    with torch.no_grad():
        error, other = ((m(x[16:]) - model(x[16:])).square().mean() for m in (module, scaled))
    assert error < other
