"""Ways of training the rounding: where they start, how they end in integers."""

from __future__ import annotations

import pytest
import torch

from cat_plugin.errors import CATValueError
from cat_plugin.ptq import QuantSpec
from cat_plugin.ptq.graph.modules import QuantOp
from cat_plugin.ptq.learned.rounding import (
    ROUNDINGS,
    AdaRound,
    FixedIntegers,
    Settled,
    StraightThrough,
    rounding_for,
)
from tests.ptq.models import small_inputs

_ATEN = torch.ops.aten


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


def test_settled_integers_are_all_as_far_from_moving_as_can_be():
    layer = _layer()
    soft = Settled(layer)
    torch.testing.assert_close(soft.weight(), layer.dequantized())
    soft.weight().sum().backward()
    assert bool((soft.latent.grad > 0).all())  # at the ends of the range, too: gradients lead back from there
    for step, moved in ((0.49, 0), (0.02, 1)):
        with torch.no_grad():
            soft.latent += step
        expected = (soft.start + moved).clamp(*layer.qrange)
        assert torch.equal(soft.integers(), expected)
    soft.harden()
    assert torch.equal(layer.q_weight.float(), expected)


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


def test_few_levels_are_relaxed_unless_told_otherwise():
    assert [rounding_for(None, bits) for bits in (2, 3, 4, 8)] == [
        AdaRound,
        AdaRound,
        StraightThrough,
        StraightThrough,
    ]
    assert rounding_for("straight_through", 2) is StraightThrough
    assert rounding_for("adaround", 4) is AdaRound


def test_fixed_integers_stay_and_their_scale_and_bias_are_trained():
    layer = _layer()
    before, integers = layer.dequantized().clone(), layer.q_weight.clone()
    soft = FixedIntegers(layer)
    torch.testing.assert_close(soft.weight(), before)
    soft.weight().sum().backward()
    assert soft.log_scale.grad is not None
    with torch.no_grad():
        soft.log_scale += 0.1
    soft.harden()
    assert torch.equal(layer.q_weight, integers)
    torch.testing.assert_close(layer.dequantized(), before * 1.1051709)


def test_every_rounding_of_the_specification_has_a_class_and_needs_integers():
    layer = _layer()
    layer.q_weight = None
    for name, rounding in ROUNDINGS.items():
        assert QuantSpec(rounding=name).rounding == name
        with pytest.raises(ValueError, match="no integers"):
            rounding(layer)
    with pytest.raises(CATValueError, match=", ".join(ROUNDINGS)):
        QuantSpec(rounding="up")
