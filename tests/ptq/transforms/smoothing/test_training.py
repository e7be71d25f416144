"""Scales and shifts that are trained: losses and rounding against their formulas, blocks, and what training gains."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from cat_plugin.equivalence import Equivalence
from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.graph.trace import trace
from cat_plugin.ptq.presets import TRAINED
from cat_plugin.ptq.transforms.smoothing.blocks import find_blocks
from cat_plugin.ptq.transforms.smoothing.fake import between, clipped_weight
from cat_plugin.ptq.transforms.smoothing.losses import BLOCK_LOSSES, TwoBranches, negative_log_cosine
from cat_plugin.ptq.transforms.smoothing.places import find_places
from cat_plugin.ptq.transforms.smoothing.training import (
    Streams,
    _BlockError,
    _SmoothedBlock,
    rows_of_a_step,
    train_block,
    widths_of,
)
from tests.zoo import ZOO


def test_rounding_is_that_of_the_formula_in_double_precision():
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    found = between(x, torch.tensor(-1.3), torch.tensor(2.1), 3).double().numpy()
    scale = 3.4 / 7
    zero = np.round(1.3 / scale)
    integers = np.clip(np.round(x.double().numpy() / scale) + zero, 0, 7)
    np.testing.assert_allclose(found, (integers - zero) * scale, atol=1e-6)
    assert len(np.unique(found)) <= 8


def test_gradients_pass_rounding_and_reach_the_ends():
    x = torch.linspace(-2, 3, 11, requires_grad=True)
    low, high = torch.tensor(-1.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    between(x, low, high, 4).sum().backward()
    inside = (x.detach() > -0.95) & (x.detach() < 1.95)
    assert torch.equal(x.grad[inside], torch.ones(int(inside.sum())))
    assert float(x.grad[0]) == float(x.grad[-1]) == 0.0
    assert float(low.grad.abs()) > 0
    assert float(high.grad.abs()) > 0


def test_a_share_of_the_range_clips_the_weight():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    half = torch.full((4, 1), math.log(0.5 / 0.5))  # the sigmoid of 0 is a half
    found = clipped_weight(weight, half, half, 8)
    torch.testing.assert_close(found.amax(1), weight.amax(1) / 2, rtol=0.02, atol=0)
    torch.testing.assert_close(found.amin(1), weight.amin(1) / 2, rtol=0.02, atol=0)


def test_the_losses_are_those_of_the_formulas_in_double_precision():
    y, a, b = torch.randn(3, 6, 5, 8, generator=torch.Generator().manual_seed(2)).double()

    def terms(y, t):
        y, t = y.numpy().reshape(-1, 8), t.numpy().reshape(-1, 8)
        cosines = (y * t).sum(1) / np.linalg.norm(y, axis=1) / np.linalg.norm(t, axis=1)
        return [((y - t) ** 2).mean(), -np.log(abs(cosines.mean()))]

    np.testing.assert_allclose(float(negative_log_cosine(y, a)), terms(y, a)[1], rtol=1e-9)
    loss = TwoBranches()
    assert float(loss(y, a, b)) == pytest.approx(4.0)  # each term over itself
    first, second = terms(y, a) + terms(y, b), terms(2 * y, a) + terms(2 * y, b)
    expected = sum(new / (0.95 * old + 0.05 * new) for old, new in zip(first, second, strict=True))
    np.testing.assert_allclose(float(loss(2 * y, a, b)), expected, rtol=1e-9)


@pytest.mark.parametrize("name", ["vit", "vit-mha", "swin", "llama", "encoder"])
def test_blocks_follow_each_other_and_hold_every_place_once(name):
    network = ZOO[name]
    module = trace(network.build(), network.inputs(2))
    places = find_places(module)
    blocks = find_blocks(module, places)
    assert [id(p) for block in blocks for p in block.places] == [id(p) for p in places]
    for block, following in itertools.pairwise(blocks):
        assert block.output is following.source
    assert blocks[-1].output is next(n for n in module.graph.nodes if n.op == "output").args[0]


@pytest.mark.parametrize(
    ("name", "method"), [("vit", "omniquant"), ("llama", "lrquant"), ("encoder", "lrquant")]
)
def test_the_error_falls_on_rows_held_out_and_the_function_stays(name, method):
    network = ZOO[name]
    model, x = network.build(), network.inputs(128)
    with torch.no_grad():  # channels far apart, as those of trained transformers
        for key, value in model.named_parameters():
            if "norm" in key and key.endswith("weight"):
                value.mul_(torch.logspace(-0.7, 0.7, len(value)))
    module = trace(model, x[:2])
    spec = QuantSpec(w_bits=3, a_bits=3, attention_bits=4, first_bits=None, smoothing=method)
    streams = Streams(x, x)
    before = Equivalence(model, x)
    outcomes = []
    with torch.no_grad():
        for block in find_blocks(module, find_places(module)):
            generator = torch.Generator().manual_seed(0)
            outcome, _ = train_block(module, block, streams, spec, 4, generator, widths_of(module, spec))
            outcomes.append(outcome)
            before.check(block.name, module, locate=False)
    outcomes = [outcome for outcome in outcomes if outcome is not None]
    assert all(outcome.after <= outcome.before for outcome in outcomes)
    assert sum(o.after for o in outcomes) < 0.97 * sum(o.before for o in outcomes)
    torch.testing.assert_close(streams.full, model(x), rtol=1e-3, atol=1e-3)
    assert not torch.equal(streams.full, streams.quantized)


def test_training_is_a_stage_with_its_report_and_the_same_every_time():
    network = ZOO["encoder"]
    model, x = network.build(), network.inputs(32)
    spec = QuantSpec(preset="fast", smoothing="lrquant", smoothing_epochs=2, num_samples=32)
    first, report = quantize(model, spec, x)
    second, _ = quantize(model, spec, x)
    trained = [unit for unit in report.units if unit.kind == "smoothing"]
    assert len(trained) == 3
    assert all(unit.steps == 8 for unit in trained)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert set(BLOCK_LOSSES) == set(TRAINED)


def test_what_is_kept_is_judged_by_the_methods_own_loss():
    """The squared error may rise where what the method descends falls."""
    network = ZOO["llama"]
    model, x = network.build(), network.inputs(128)
    spec = QuantSpec(w_bits=2, a_bits=3, first_bits=None, smoothing="lrquant", a_granularity="token")
    module = trace(model, x[:2])
    block = find_blocks(module, find_places(module))[0]
    soft = _SmoothedBlock(module, block, widths_of(module, spec), spec)
    with torch.no_grad():
        target = soft.full(x)
        objective = _BlockError(soft, x, target, target + 0.1, TwoBranches())
        assert objective.judge() == pytest.approx(1.0)
        y = soft.run(x[-8:])
        wanted = [float(t) for t in TwoBranches().terms(y, target[-8:], target[-8:] + 0.1)]
        soft.scales[0].mul_(1.5)
        y = soft.run(x[-8:])
        given = [float(t) for t in TwoBranches().terms(y, target[-8:], target[-8:] + 0.1)]
        expected = np.mean(np.asarray(given) / np.asarray(wanted))
        assert objective.judge() == pytest.approx(expected, rel=1e-5)
        error = float((y - target[-8:]).square().sum() / target[-8:].square().sum())
        assert objective.squared_error() == pytest.approx(error, rel=1e-5)


def test_groups_of_weights_are_clipped_each_over_its_own_range():
    weight = torch.cat([torch.randn(3, 8), 100 * torch.randn(3, 8)], 1)
    shares = torch.full((6, 1), 30.0)
    found = clipped_weight(weight, shares, shares, 4)
    parts = [clipped_weight(part, shares[:3], shares[:3], 4) for part in weight.split(8, 1)]
    torch.testing.assert_close(found, torch.cat(parts, 1))


def test_a_step_takes_fewer_inputs_where_they_have_many_tokens():
    assert rows_of_a_step(torch.zeros(4, 257, 16)) == 8
    assert rows_of_a_step(torch.zeros(4, 3, 224, 224)) == 8
    assert rows_of_a_step(torch.zeros(4, 1024, dtype=torch.int64)) == 4
    assert rows_of_a_step(torch.zeros(4, 9000, 16)) == 1
