"""Training of units: losses that go down, bad luck, and rows held out."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.learned.descent import Outcome, held_out_rows
from cat_plugin.ptq.learned.rounding import AdaRound, Rates, StraightThrough
from cat_plugin.ptq.stages import units as stages
from tests.ptq.learned.prepared import SHORT, train_units
from tests.ptq.models import SmallResNet, randomise, small_inputs


@pytest.mark.parametrize("rounding", [StraightThrough, AdaRound])
def test_reconstruction_lowers_the_loss_of_every_block(rounding):
    settings = dataclasses.replace(SHORT, rounding=rounding, rates=Rates(weight=0.05))
    outcomes, prepared = train_units(settings)
    for name in ("block1", "block2"):
        assert outcomes[name].after <= outcomes[name].before
    assert outcomes["block2"].after < outcomes["block2"].before
    for layer in prepared.layers:
        assert layer.q_weight.dtype == torch.int8
        assert int(layer.q_weight.min()) >= -2
        assert int(layer.q_weight.max()) <= 1


@pytest.mark.parametrize("bits", [2, 4])
def test_adaround_is_that_of_integers_when_its_rates_fall(monkeypatch, bits):
    """Else what training has fitted scales and biases to is not what is written down."""
    soft = []
    harden = AdaRound.harden

    def hardened(self):
        soft.append((2 * self._up() - 1).detach().abs().flatten())
        harden(self)

    monkeypatch.setattr(AdaRound, "harden", hardened)
    settings = dataclasses.replace(SHORT, rounding=AdaRound, rates=AdaRound.rates, steps=300)
    train_units(settings, w_bits=bits)
    assert float((torch.cat(soft) < 0.98).float().mean()) < 0.01


@pytest.mark.parametrize("extra", [{"fisher": True}, {"guidance": 0.1}, {}])
def test_same_seed_same_bits_with_every_loss(extra):
    settings = dataclasses.replace(SHORT, steps=8, drop_probability=0.5, input_mix=0.5)
    first, second = (train_units(settings, **extra)[1] for _ in range(2))
    for a, b in zip(first.layers, second.layers, strict=True):
        assert torch.equal(a.q_weight, b.q_weight)
        assert torch.equal(a.scale, b.scale)
        assert torch.equal(a.bias, b.bias)


def test_a_loss_that_turns_nan_keeps_the_initial_values():
    plain, _ = train_units(dataclasses.replace(SHORT, steps=0))
    outcomes, prepared = train_units(dataclasses.replace(SHORT, rates=Rates(scale=float("inf"))))
    assert "NaN" in outcomes["block1"].note
    assert outcomes["block1"].after == plain["block1"].before
    for layer in prepared.layers:
        assert torch.isfinite(layer.scale).all()


def test_training_that_gains_nothing_skips_to_the_end_of_its_schedule():
    frozen = dataclasses.replace(SHORT, rates=Rates(weight=0.0, scale=0.0, step=0.0, bias=0.0))
    outcomes, _ = train_units(frozen)
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
