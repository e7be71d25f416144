"""What a caller hears while a model is quantized."""

from __future__ import annotations

import pytest

from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.progress import Reporter
from tests.ptq.models import SmallResNet, randomise, small_inputs

_TRAINED = {"unit_steps": 6, "model_steps": 4, "refinement_steps": 3, "batch_size": 8}


def test_progress_counts_up_to_one_and_names_the_units():
    model, x = randomise(SmallResNet()), small_inputs(24, 3, 12, 12)
    events = []
    quantize(model, QuantSpec(w_bits=2, a_bits=2, preset="best", **_TRAINED), x, progress=events.append)
    fractions = [event.fraction for event in events]
    assert fractions == sorted(fractions)
    assert fractions[-1] <= 1.0
    finished = [event.stage for event in events if event.loss_after is not None]
    assert finished == ["block1", "block2", "model", "refinement"]
    assert all(event.seconds_left is None or event.seconds_left >= 0 for event in events)


def test_the_time_left_is_told_once_there_is_a_pace(monkeypatch):
    """What an earlier run has done says nothing about it, nor does the first moment's work."""
    events = []
    reporter = Reporter(events.append)
    reporter.total = 100.0
    monkeypatch.setattr("time.monotonic", lambda: reporter.started + 4.0)
    reporter.skip(80.0)
    reporter.finish("first", None, None, 1.0)
    reporter.finish("second", None, None, 9.0)
    assert events[0].seconds_left is None
    assert events[1].seconds_left == pytest.approx(4.0)  # as much work is left as was done
    assert events[1].fraction == 0.9
