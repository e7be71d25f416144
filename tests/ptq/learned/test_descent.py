"""The training loop: which rows it trains on, which it judges on, what it keeps."""

from __future__ import annotations

import math

import pytest
import torch

from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.graph.units import find_units, whole_model
from cat_plugin.ptq.learned.descent import Schedule, descend, held_out_rows
from cat_plugin.ptq.learned.logit_training import LogitTraining
from cat_plugin.ptq.learned.refinement import refine
from cat_plugin.ptq.learned.rounding import Rates, StraightThrough, parameter_groups
from cat_plugin.ptq.learned.soft_unit import SoftUnit
from tests.ptq.learned.prepared import fit_closed_form, prepare
from tests.ptq.models import SmallResNet, randomise, small_inputs


def test_a_sixteenth_is_held_out_where_it_can_be_spared():
    assert [held_out_rows(count) for count in (0, 64, 127, 128, 1024)] == [0, 0, 0, 8, 64]


class Scripted:
    """Says what it is told to at each look; its loss moves the scales."""

    count = 10

    def __init__(self, soft, judged):
        self.soft, self.judged, self.rows = soft, list(judged), []

    def losses(self, rows):
        self.rows.append(rows)
        for layer in self.soft.layers.values():
            yield layer.log_scale.sum()

    def judge(self):
        assert not torch.is_grad_enabled()
        return torch.tensor(self.judged.pop(0)).reshape(-1)


def scripted(judged, **schedule):
    _, module, prepared, spec, x = prepare()
    fit_closed_form(prepared, x, spec)
    unit = find_units(module)[1]
    soft = SoftUnit(module, unit, StraightThrough)
    objective = Scripted(soft, judged)
    before = [layer.scale.clone() for layer in unit.layers]
    outcome = descend(
        soft,
        parameter_groups(soft, Rates()),
        objective,
        Schedule(**{"steps": 20, "batch_size": 5, "looks": 5, **schedule}),
        torch.Generator().manual_seed(0),
    )
    moved = [float((layer.scale / old).log().mean()) for layer, old in zip(unit.layers, before, strict=True)]
    return outcome, objective, moved


def moved_by(steps):
    """What Adam's steps of one sign add up to in the scales of both layers, of a schedule of 20."""
    rates = [1e-3 * 0.5 * (1 + math.cos(step / 20 * math.pi)) for step in range(steps)]
    return [-sum(rates)] * 2


def test_the_best_state_seen_is_kept():
    outcome, objective, moved = scripted([1.0, 0.5, 0.7, 0.7, 0.7, 0.7])
    assert (outcome.before, outcome.after, outcome.steps, outcome.note) == (1.0, 0.5, 20, "")
    assert moved == pytest.approx(moved_by(4), rel=1e-2)  # to the first look
    for epoch in range(10):
        assert sorted(torch.cat(objective.rows[2 * epoch : 2 * epoch + 2]).tolist()) == list(range(10))


def test_the_last_state_is_kept_where_that_is_asked_for_and_it_is_no_worse_than_the_first():
    outcome, _, moved = scripted([1.0, 0.5, 0.7, 0.7, 0.7, 0.7], keeps_last=True)
    assert (outcome.before, outcome.after, outcome.note) == (1.0, pytest.approx(0.7), "")
    assert moved == pytest.approx(moved_by(20), rel=1e-2)
    outcome, _, moved = scripted([1.0, 0.5, 0.7, 0.7, 0.7, 1.1], keeps_last=True)
    assert outcome.after == 0.5
    assert moved == pytest.approx(moved_by(4), rel=1e-2)


@pytest.mark.parametrize(
    ("last", "kept"),
    [
        ([0.9, 2.0, 3.0, 5.0], True),  # one example alone makes the mean worse, by less than its error
        ([1.0, 2.0, 3.0, 3.9], True),
        ([1.3, 2.2, 3.3, 4.2], False),  # all examples are worse
        ([1.0, 2.0, 3.0, float("nan")], False),
        ([1.0, 2.0, 3.0, float("inf")], False),
    ],
)
def test_what_cannot_be_told_from_the_first_state_is_kept_and_what_is_worse_is_not(last, kept):
    first, between = [1.0, 2.0, 3.0, 4.0], [9.0] * 4
    outcome, _, moved = scripted([first, between, between, between, between, last], keeps_last=True)
    assert outcome.before == 2.5
    assert (outcome.after, outcome.note == "") == (
        (pytest.approx(sum(last) / 4), True) if kept else (2.5, False)
    )
    assert moved == (pytest.approx(moved_by(20), rel=1e-2) if kept else [0.0, 0.0])


def test_patience_skips_to_the_end_and_nothing_gained_leaves_everything():
    outcome, objective, moved = scripted([1.0] * 6, patience=2)
    assert outcome.steps == len(objective.rows) == 8 + 6  # two looks without gain, then the last 30 %
    assert "did not improve" in outcome.note
    assert moved == [0.0, 0.0]


@pytest.mark.parametrize(("damaged", "note"), [(slice(150, 160), "did not improve"), (slice(0, 150), "NaN")])
def test_training_on_the_logits_is_judged_on_rows_that_it_does_not_train_on(damaged, note):
    """160 rows, the last ten held out: NaN there reaches the judgement alone, NaN elsewhere the training."""
    _, module, prepared, spec, _ = prepare()
    x = small_inputs(160, 3, 12, 12)
    logits = fit_closed_form(prepared, x, spec)
    logits[damaged] = float("nan")
    settings = LogitTraining(steps=6, batch_size=50)
    outcome = refine(module, whole_model(module), x, logits, settings, torch.Generator().manual_seed(0))
    assert note in outcome.note


@pytest.mark.parametrize(
    "stage", [{"refinement_steps": 2}, {"model_steps": 2, "refinement_steps": 0}], ids=["refinement", "model"]
)
def test_the_closed_form_leaves_those_rows_alone_where_only_the_logits_are_trained(stage):
    model, x = randomise(SmallResNet()), small_inputs(160, 3, 12, 12)
    others = torch.cat([x[:-10], 3 * small_inputs(10, 3, 12, 12, seed=8)])

    def ranges(inputs, **options):
        spec = QuantSpec(
            w_bits=2, a_bits=2, batch_size=16, **{"preset": "balanced", "unit_steps": 0, **options}
        )
        _, report = quantize(model, spec, inputs)
        return [(layer.loss_before, layer.loss_after) for layer in report.layers]

    assert ranges(x, **stage) == ranges(others, **stage)
    assert ranges(x, preset="fast") != ranges(others, preset="fast")
