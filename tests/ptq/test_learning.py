"""What is learned by gradient: gradients, starting points, hardening, losses that go down, bad luck."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import numpy as np
import pytest
import torch

from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.cache import TensorStore
from cat_plugin.ptq.closed_form.sequence import SequentialFit
from cat_plugin.ptq.graph.fold import fold_batch_norm
from cat_plugin.ptq.graph.insert import insert_quantizers
from cat_plugin.ptq.graph.modules import QuantOp
from cat_plugin.ptq.graph.trace import trace
from cat_plugin.ptq.graph.units import find_units, whole_model
from cat_plugin.ptq.learned.augment import mirrored_and_shifted, with_patches
from cat_plugin.ptq.learned.descent import Outcome, held_out_rows
from cat_plugin.ptq.learned.logit_training import LogitTraining, divergence
from cat_plugin.ptq.learned.losses import fisher_weights, loss_gradient, prediction_difference
from cat_plugin.ptq.learned.reconstruction import Reconstruction, reconstruct
from cat_plugin.ptq.learned.refinement import refine
from cat_plugin.ptq.learned.rounding import AdaRound, Rates, StraightThrough
from cat_plugin.ptq.learned.soft_unit import float_call, run_float, run_nodes
from cat_plugin.ptq.learned.steps import DropMask, quantize_with_step
from cat_plugin.ptq.quantizers.uniform import ActQuantizer
from cat_plugin.ptq.stages import units as stages
from tests.ptq.models import SmallResNet, randomise, small_inputs

_ATEN = torch.ops.aten


@pytest.mark.parametrize(("zero", "low", "high"), [(0, 0, 3), (-1, -2, 1), (3, -8, 7)])
@pytest.mark.parametrize("dropped", [False, True])
def test_step_gradients_equal_the_formula(zero, low, high, dropped):
    x = small_inputs(4, 33, seed=1).requires_grad_()
    scale = torch.tensor(0.37, requires_grad=True)
    keep = (small_inputs(4, 33, seed=2) > 0).float() if dropped else None
    weights = small_inputs(4, 33, seed=3)
    y = quantize_with_step(x, scale, zero, low, high, keep)
    (y * weights).sum().backward()
    with torch.no_grad():
        ratio = x / scale
        q = torch.clamp(torch.round(ratio) + zero, low, high) - zero
        inside = (ratio > low - zero - 0.5) & (ratio < high - zero + 0.5)
        part = torch.ones_like(x) if keep is None else keep
        torch.testing.assert_close(y, part * q * scale + (1 - part) * x)
        torch.testing.assert_close(x.grad, weights * (part * inside + (1 - part)))
        expected = (weights * part * torch.where(inside, q - ratio, q)).sum()
        torch.testing.assert_close(scale.grad, expected, rtol=1e-4, atol=1e-4)


def test_training_forward_equals_the_hard_quantizer():
    quantizer = ActQuantizer(4)
    quantizer.set_range(0.213, -3, True)
    x = small_inputs(7, 50, seed=4)
    torch.testing.assert_close(
        quantize_with_step(x, quantizer.scale, -3, -8, 7), quantizer(x), rtol=1e-6, atol=0
    )


def test_masks_have_the_layout_and_the_share_asked_for():
    mask = DropMask(0.3, torch.Generator().manual_seed(0), torch.device("cpu"))
    x = torch.zeros(8, 16, 9, 9).contiguous(memory_format=torch.channels_last)
    keep = mask.like(x)
    assert keep.stride() == x.stride()
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    assert float(keep.mean()) == pytest.approx(0.7, abs=0.02)
    assert not torch.equal(keep, mask.like(x))
    assert DropMask(0.0, torch.Generator(), torch.device("cpu")).like(x) is None


def _layer(bits=2):
    layer = QuantOp("l", _ATEN.linear.default, small_inputs(6, 20, seed=5), torch.zeros(6), (), bits, bits)
    layer.scale = torch.full((6,), 0.7)
    layer.zero_point = torch.tensor([0, -1, 0, 1, 0, -1])
    layer.q_weight = layer.round_to_nearest()
    layer.q_weight[0, :5] = 1  # not where rounding would put it: what compensation does
    return layer


def test_straight_through_starts_from_the_integers_given():
    layer = _layer()
    before = layer.dequantized().clone()
    soft = StraightThrough(layer)
    torch.testing.assert_close(soft.weight(), before)
    soft.harden()
    torch.testing.assert_close(layer.dequantized(), before)


def test_adaround_starts_near_the_integers_and_hardens_to_neighbours():
    layer = _layer()
    q0, before = layer.q_weight.clone(), layer.dequantized().clone()
    soft = AdaRound(layer)
    assert float((soft.weight().detach() - before).abs().max()) < 0.7 * 0.7
    assert float(soft.regularizer(1.0).detach()) > 0
    assert soft.regularizer(0.05) is None
    with torch.no_grad():
        torch.testing.assert_close(soft.weight(), before)  # judged as the integers that it would write
    soft.harden()
    assert torch.equal(layer.q_weight, q0)
    with torch.no_grad():
        soft.latent.copy_(-soft.latent)
    soft.harden()
    assert int((layer.q_weight.int() - q0.int()).abs().max()) == 1


def _prepared(**options):
    spec = QuantSpec(w_bits=2, a_bits=2, first_bits=None, last_bits=None, batch_size=16, **options)
    model = randomise(SmallResNet())
    x = small_inputs(64, 3, 12, 12)
    module = trace(model, x)
    fold_batch_norm(module)
    prepared = insert_quantizers(module, spec)
    return model, module, prepared, spec, x


_SHORT = Reconstruction(steps=120, batch_size=16, rates=Rates(weight=0.02))


def _fitted(prepared, x, spec):
    """Fit every layer in closed form; the full-precision logits."""
    with TensorStore() as store:
        fit = SequentialFit(prepared, x, spec, store)
        assert not list(fit.run())
        return fit.logits


def _train_units(settings, **extra):
    _, module, prepared, spec, x = _prepared()
    outcomes = {}

    with TensorStore() as store:
        for fitted in SequentialFit(prepared, x, spec, store, changed=True).run(find_units(module)):
            unit, y = fitted.unit, fitted.targets
            outcomes[unit.name] = reconstruct(
                module,
                unit,
                fitted.inputs,
                fitted.full_inputs,
                y,
                settings,
                torch.Generator().manual_seed(0),
                weights=fisher_weights(module, unit, y, 16) if extra.get("fisher") else None,
                guidance=prediction_difference(module, unit, y, extra.get("guidance", 0.0), 2.0),
            )
    return outcomes, prepared


def test_activations_of_a_step_go_without_the_garbage_collector():
    _, module, _, _, x = _prepared()
    whole = whole_model(module)
    seen = []

    def call(child, value):
        result = float_call(child, value)
        seen.append(weakref.ref(result))
        return result

    gc.collect()
    gc.disable()
    try:
        run_nodes(module, whole.nodes, {whole.source: x.clone()}, call)
        assert seen
        assert all(reference() is None for reference in seen)
    finally:
        gc.enable()


@pytest.mark.parametrize("rounding", [StraightThrough, AdaRound])
def test_reconstruction_lowers_the_loss_of_every_block(rounding):
    settings = dataclasses.replace(_SHORT, rounding=rounding, rates=Rates(weight=0.05))
    outcomes, prepared = _train_units(settings)
    for name in ("block1", "block2"):
        assert outcomes[name].after <= outcomes[name].before
    assert outcomes["block2"].after < outcomes["block2"].before
    for layer in prepared.layers:
        assert layer.q_weight.dtype == torch.int8
        assert int(layer.q_weight.min()) >= -2
        assert int(layer.q_weight.max()) <= 1


@pytest.mark.parametrize("extra", [{"fisher": True}, {"guidance": 0.1}, {}])
def test_same_seed_same_bits_with_every_loss(extra):
    settings = dataclasses.replace(_SHORT, steps=8, drop_probability=0.5, input_mix=0.5)
    first, second = (_train_units(settings, **extra)[1] for _ in range(2))
    for a, b in zip(first.layers, second.layers, strict=True):
        assert torch.equal(a.q_weight, b.q_weight)
        assert torch.equal(a.scale, b.scale)
        assert torch.equal(a.bias, b.bias)


def test_a_loss_that_turns_nan_keeps_the_initial_values():
    plain, _ = _train_units(dataclasses.replace(_SHORT, steps=0))
    outcomes, prepared = _train_units(dataclasses.replace(_SHORT, rates=Rates(scale=float("inf"))))
    assert "NaN" in outcomes["block1"].note
    assert outcomes["block1"].after == plain["block1"].before
    for layer in prepared.layers:
        assert torch.isfinite(layer.scale).all()


def test_training_that_gains_nothing_skips_to_the_end_of_its_schedule():
    frozen = dataclasses.replace(_SHORT, rates=Rates(weight=0.0, scale=0.0, step=0.0, bias=0.0))
    outcomes, _ = _train_units(frozen)
    assert outcomes["block1"].steps == 36 + 36  # three looks, a tenth of 120 apart; then the last 30 %
    assert "did not improve" in outcomes["block1"].note


def test_training_is_judged_on_inputs_that_the_closed_form_has_not_seen(monkeypatch):
    model, x = randomise(SmallResNet()), small_inputs(160, 3, 12, 12)
    held = held_out_rows(len(x))
    assert held == 10
    monkeypatch.setattr(stages, "reconstruct", lambda *_, **__: Outcome(1.0, 1.0, 0))

    def closed(inputs, preset="balanced"):
        spec = QuantSpec(w_bits=2, a_bits=2, preset=preset, refinement_steps=0, batch_size=16)
        return quantize(model, spec, inputs)[0].state_dict()

    def same(first, second):
        return all(torch.equal(first[name], second[name]) for name in first)

    others = torch.cat([x[:-held], 3 * small_inputs(held, 3, 12, 12, seed=8)])
    assert same(closed(x), closed(others))
    assert not same(closed(x, "fast"), closed(others, "fast"))
    others[len(x) - held - 1] *= 3
    assert not same(closed(x), closed(others))


def test_fisher_weights_are_mean_squared_gradients():
    _, module, _, _, x = _prepared()
    unit = find_units(module)[1]
    y = run_float(module, module_nodes_until(module, unit), placeholder(module), x, unit.output)
    weights = fisher_weights(module, unit, y, 16)
    gradients = []
    for row in y:
        leaf = row.unsqueeze(0).clone().requires_grad_()
        order = list(module.graph.nodes)
        rest = [n for n in order[order.index(unit.output) + 1 :] if n.op not in ("get_attr", "output")]
        logits = run_float(module, rest, unit.output, leaf, order[-1].args[0])
        torch.nn.functional.cross_entropy(logits, logits.argmax(1)).backward()
        gradients.append(leaf.grad)
    expected = torch.cat(gradients).square().mean(0, keepdim=True)
    torch.testing.assert_close(weights, (expected / expected.mean()).clamp(min=0.01), rtol=1e-3, atol=1e-4)
    assert loss_gradient(module, unit, y[:3], torch.zeros(3, dtype=torch.long)).shape == y[:3].shape


def placeholder(module):
    return next(n for n in module.graph.nodes if n.op == "placeholder")


def module_nodes_until(module, unit):
    order = [n for n in module.graph.nodes if n.op not in ("get_attr", "output", "placeholder")]
    return order[: order.index(unit.output) + 1]


def test_refinement_moves_scales_and_zero_points_only_and_lowers_the_divergence():
    model, module, prepared, spec, x = _prepared()
    logits = _fitted(prepared, x, spec)
    for layer in prepared.layers:  # the closed form leaves so small a model near its optimum
        layer.scale = layer.scale * 1.1
    with torch.no_grad():
        torch.testing.assert_close(logits, model(x), rtol=1e-4, atol=1e-5)
        before = float(divergence(module(x), logits, 2.0))
    kept = [(layer.q_weight.clone(), layer.bias.clone(), layer.scale.clone()) for layer in prepared.layers]
    settings = LogitTraining(steps=40, batch_size=32)
    outcome = refine(module, whole_model(module), x, logits, settings, torch.Generator().manual_seed(0))
    with torch.no_grad():
        after = float(divergence(module(x), logits, 2.0))
    assert outcome.after < outcome.before
    assert after < before
    assert outcome.after == pytest.approx(after, rel=1e-3)
    for layer, (q_weight, bias, scale) in zip(prepared.layers, kept, strict=True):
        assert torch.equal(layer.q_weight, q_weight)
        assert torch.equal(layer.bias, bias)
        assert layer.zero_point.dtype == torch.int64
        assert not torch.equal(layer.scale, scale)


@pytest.mark.parametrize("augment", [False, True])
def test_a_step_on_the_logits_may_be_taken_in_pieces(augment):
    def moved(piece):
        _, module, prepared, spec, x = _prepared()
        logits = _fitted(prepared, x, spec)
        before = [layer.scale * 1.1 for layer in prepared.layers]
        for layer, scale in zip(prepared.layers, before, strict=True):
            layer.scale = scale
        settings = LogitTraining(steps=8, batch_size=32, augment=augment, piece=piece)
        refine(
            module, whole_model(module), x, logits, settings, torch.Generator().manual_seed(0), penalty=1.0
        )
        return torch.cat([x.scale / y - 1 for x, y in zip(prepared.layers, before, strict=True)])

    whole, pieces = moved(32), moved(5)
    assert float(whole.abs().max()) > 1e-3
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-5)


def test_divergence_is_kullback_leibler():
    z_q, z_fp = small_inputs(5, 7, seed=1).double(), small_inputs(5, 7, seed=2).double()
    p, q = torch.softmax(z_fp / 3, 1), torch.softmax(z_q / 3, 1)
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(divergence(z_q, z_fp, 3.0), expected)


def test_every_image_is_mirrored_and_shifted_by_itself():
    x = small_inputs(64, 3, 20, 24, seed=3)
    y = mirrored_and_shifted(x, torch.Generator().manual_seed(0))
    assert y.shape == x.shape
    seen = set()
    for image, view in zip(x.numpy(), y.numpy(), strict=True):
        padded = np.pad(image, ((0, 0), (2, 2), (2, 2)), mode="reflect")
        views = {
            (dy, dx, step): padded[:, dy : dy + 20, dx : dx + 24][:, :, ::step]
            for dy in range(5)
            for dx in range(5)
            for step in (1, -1)
        }
        found = [place for place, expected in views.items() if np.array_equal(expected, view)]
        assert len(found) == 1
        seen.update(found)
    assert len(seen) > 30  # of 50
    assert torch.equal(y, mirrored_and_shifted(x, torch.Generator().manual_seed(0)))


def test_patches_are_squares_of_the_preceding_image():
    x = small_inputs(5, 3, 20, 24, seed=4)
    generator = torch.Generator().manual_seed(0)
    unchanged = 0
    for _ in range(40):
        y = with_patches(x, generator)
        moved = (y != x).any(1)
        unchanged += not bool(moved.any())
        if not moved.any():
            continue
        assert bool((moved == moved[0]).all())  # one place for the whole batch
        rows, columns = moved[0].any(1).nonzero().flatten(), moved[0].any(0).nonzero().flatten()
        inside = (
            slice(None),
            slice(int(rows[0]), int(rows[-1]) + 1),
            slice(int(columns[0]), int(columns[-1]) + 1),
        )
        assert abs(len(rows) / 20 - len(columns) / 24) < 0.05
        for before, image, view in zip(x.roll(1, 0), x, y, strict=True):
            assert torch.equal(view[inside], before[inside])
            assert int((view != image).any(0).sum()) == len(rows) * len(columns)
    assert 10 < unchanged < 32
