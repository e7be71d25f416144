"""Bit-widths under a budget."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_plugin.errors import CATValueError
from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.closed_form.mixed_precision import choose_bits
from tests.ptq.models import SmallResNet, randomise, small_inputs


@given(
    st.lists(
        st.tuples(st.integers(1, 50), st.lists(st.floats(0, 5), min_size=3, max_size=3)),
        min_size=1,
        max_size=5,
    ),
    st.floats(2.0, 8.0),
)
@settings(deadline=None, max_examples=60)
def test_chosen_bits_are_the_cheapest_within_the_budget(units, budget):
    sizes, costs = [u[0] for u in units], [u[1] for u in units]
    candidates = [2, 4, 8]
    chosen = choose_bits(costs, sizes, candidates, budget)
    total = sum(sizes)

    def cost(bits):
        return sum(c[candidates.index(b)] for c, b in zip(costs, bits, strict=True))

    def mean(bits):
        return sum(b * s for b, s in zip(bits, sizes, strict=True)) / total

    assert mean(chosen) <= budget + 1e-6
    options = itertools.product(candidates, repeat=len(units))
    best = min(cost(bits) for bits in options if mean(bits) <= budget + 1e-12)
    assert cost(chosen) == pytest.approx(best, abs=1e-9)


def test_a_budget_below_the_smallest_width_is_refused():
    with pytest.raises(CATValueError, match="budget"):
        choose_bits([[1.0, 0.0]], [10], [4, 8], 3.0)


def test_mixed_precision_keeps_the_budget_and_the_fixed_layers():
    model, x = randomise(SmallResNet()), small_inputs(32, 3, 12, 12)
    spec = QuantSpec(w_bits=4, a_bits=8, preset="fast", weight_budget=3.5, batch_size=8)
    _, report = quantize(model, spec, x)
    free = [layer for layer in report.layers if layer.name not in ("stem.0", "fc")]
    counts = [torch.Size(layer.weight_shape).numel() for layer in free]
    mean = sum(layer.w_bits * n for layer, n in zip(free, counts, strict=True)) / sum(counts)
    assert mean <= 3.5
    assert report.layers[0].w_bits == report.layers[-1].w_bits == 8
    assert any("mixed precision" in note for note in report.notes)
