"""Folding, equalization, tracing, units: what is done to the graph before anything is learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from cat_plugin.errors import QuantizationError
from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.graph.fold import fold_batch_norm
from cat_plugin.ptq.graph.insert import insert_quantizers
from cat_plugin.ptq.graph.ops import WEIGHTED, is_call
from cat_plugin.ptq.graph.trace import trace
from cat_plugin.ptq.graph.units import find_units
from cat_plugin.ptq.learned.soft_unit import run_float
from cat_plugin.ptq.quantizers.observers import search_activation_range, search_weight_range
from cat_plugin.ptq.transforms import equalization
from cat_plugin.ptq.transforms.equalization import Ceiling, Equalization, has_depthwise
from tests.ptq.models import Attention, Gelu1d, GroupedNet, SmallResNet, Uneven, randomise, small_inputs

MODELS = [
    (SmallResNet, (4, 3, 12, 12)),
    (GroupedNet, (4, 4, 8, 8)),
    (Gelu1d, (4, 2, 40)),
    (Attention, (4, 3, 16, 16)),
]


@pytest.mark.parametrize(("make", "shape"), MODELS)
def test_the_folded_graph_computes_the_model_at_any_batch_size(make, shape):
    model, x = randomise(make()), small_inputs(*shape)
    module = trace(model, x[:1])
    fold_batch_norm(module)
    assert not any("batch_norm" in str(n.target) for n in module.graph.nodes)
    for count in (1, 3, 4):
        with torch.no_grad():
            torch.testing.assert_close(module(x[:count]), model(x[:count]), rtol=1e-4, atol=1e-5)


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


def test_in_place_operations_are_seen_by_later_readers():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            y = self.fc(x)
            F.relu(y, inplace=True)  # y itself changes
            return y + 1.0

    model, x = randomise(InPlace()), small_inputs(6, 4)
    with torch.no_grad():
        torch.testing.assert_close(trace(model, x)(x), model(x))


def _uneven():
    model, x = randomise(Uneven()), small_inputs(32, 3, 6, 6)
    model.a.weight.data *= torch.logspace(-1, 0.7, 6).reshape(-1, 1, 1, 1)
    model.a.bias.data += 0.1
    module = trace(model, x)
    weights = [getattr(module, n.args[1].target).clone() for n in module.graph.nodes if is_call(n, WEIGHTED)]
    spec = QuantSpec(w_bits=4, a_bits=4, batch_size=8)
    finish = Equalization().fold(module, x, spec, torch.Generator().manual_seed(0))
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
    gains = equalization._gains(values, seen.var(1), seen.amax(1), 255, weight, 4, top)
    assert float((gains * seen.amax(1)).max()) <= top * 1.001  # nothing is cut earlier than it was
    error = _rounded_output_error(values, weight, gains, 4, 8, top)
    none = _rounded_output_error(values, weight, torch.ones(channels), 4, 8, top)
    assert error < 0.7 * none
    at_8_bits = equalization._gains(values, seen.var(1), seen.amax(1), 15, weight, 8, top)
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
    found = equalization._activation_noise(values, gains, 15, 6.0, importance)
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


def test_dead_channels_do_equalization_no_harm():
    model, x = randomise(Uneven()), small_inputs(16, 3, 6, 6)
    model.a.weight.data[2], model.a.bias.data[2] = 0, -1.0  # nothing comes through ReLU6
    model.b.weight.data[4], model.b.bias.data[4] = 0, 0
    model.c.weight.data[:], model.c.bias.data[:] = 0, 0.5  # a constant tensor
    module, _ = quantize(model, QuantSpec(w_bits=8, a_bits=8, preset="fast", batch_size=8), x)
    with torch.no_grad():
        torch.testing.assert_close(module(x), model(x), rtol=0.02, atol=0.02)
    low, _ = quantize(model, QuantSpec(w_bits=2, a_bits=2, preset="fast", batch_size=8), x)
    assert torch.isfinite(low(x)).all()


def test_equalization_is_for_depthwise_models_unless_asked_for():
    for make, shape, expected in ((GroupedNet, (4, 4, 8, 8), True), (SmallResNet, (4, 3, 12, 12), False)):
        assert has_depthwise(trace(randomise(make()), small_inputs(*shape))) is expected


def _units(make, shape, **options):
    module = trace(randomise(make()), small_inputs(*shape))
    fold_batch_norm(module)
    insert_quantizers(module, QuantSpec())
    return module, find_units(module, **options)


def test_residual_blocks_are_units_and_chains_are_layers():
    _, units = _units(SmallResNet, (4, 3, 12, 12))
    assert [u.name for u in units] == ["stem.0", "block1", "block2", "fc"]
    assert [len(u.layers) for u in units] == [1, 2, 2, 1]
    _, units = _units(Gelu1d, (4, 2, 40))
    assert [u.name for u in units] == ["a", "b", "fc"]


def test_blocks_without_a_shortcut_follow_their_siblings_with_one():
    class Inverted(nn.Module):
        def __init__(self, channels, shortcut):
            super().__init__()
            self.conv = nn.Sequential(nn.Conv2d(channels, 8, 1), nn.ReLU6(), nn.Conv2d(8, channels, 1))
            self.shortcut = shortcut

        def forward(self, x):
            return x + self.conv(x) if self.shortcut else self.conv(x)

    def make():
        blocks = nn.Sequential(*(Inverted(3, shortcut) for shortcut in (False, True, False, False)))
        return nn.Sequential(nn.Conv2d(3, 3, 1), blocks, nn.Flatten(), nn.Linear(48, 2))

    _, units = _units(make, (4, 3, 4, 4))
    # the container of a block's layers is no block, nor is that of the blocks
    assert [len(u.layers) for u in units] == [1, 2, 2, 2, 2, 1]
    assert [u.name for u in units] == ["0", *(f"1.{i}.conv" for i in range(4)), "3"]
    _, units = _units(Gelu1d, (4, 2, 40), names=("a", "b"))
    assert [u.name for u in units] == ["a", "b", "fc"]


@pytest.mark.parametrize(("make", "shape"), MODELS)
@pytest.mark.parametrize("granularity", ["layer", "block", "model"])
def test_units_in_a_row_compute_the_graph(make, shape, granularity):
    from cat_plugin.ptq.learned.soft_unit import run_nodes

    module, units = _units(make, shape, granularity=granularity)
    x = small_inputs(*shape)
    layers = [layer for unit in units for layer in unit.layers]
    assert (
        len(layers)
        == len(set(layers))
        == sum(n.op == "call_module" and n.target.startswith("op_") for n in module.graph.nodes)
    )
    if granularity != "layer":
        value = x
        for unit in units:
            env = {unit.source: value}
            run_nodes(module, unit.nodes, env, lambda child, v: child(v))
            value = env[unit.output]
        torch.testing.assert_close(value, module(x), rtol=1e-5, atol=1e-6)


def test_layer_units_reach_inside_blocks():
    _, units = _units(SmallResNet, (4, 3, 12, 12), granularity="layer")
    assert [u.name for u in units] == [
        "stem.0",
        "block1.conv1",
        "block1.conv2",
        "block2.conv1",
        "block2.conv2",
        "fc",
    ]
    assert [str(u.output.target) for u in units[:3]] == [
        "aten.relu.default",
        "aten.relu.default",
        "op_conv2d_2",
    ]


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


def test_attention_inputs_are_quantized_on_request():
    model, x = randomise(Attention("matmul")), small_inputs(16, 3, 16, 16)
    _, plain = quantize(model, QuantSpec(w_bits=8, a_bits=8, preset="fast"), x)
    assert sum("matmul" in entry for entry in plain.unquantized) == 2
    module, asked = quantize(model, QuantSpec(w_bits=8, a_bits=8, preset="fast", attention_bits=8), x)
    assert asked.unquantized == []
    for node in module.graph.nodes:
        if "matmul" in str(node.target):
            assert all("dequantize_per_tensor" in str(a.target) for a in node.args)


def test_control_flow_on_the_data_is_refused():
    class Picky(nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(QuantizationError, match="traced neither"):
        quantize(nn.Sequential(nn.Linear(3, 3), Picky()), QuantSpec(preset="fast"), small_inputs(4, 3))
