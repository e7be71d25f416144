"""The list of stages, and the loop that runs them."""

from __future__ import annotations

import json

import pytest
import torch

from cat_plugin.ptq import QuantSpec
from cat_plugin.ptq.cache import TensorStore
from cat_plugin.ptq.checkpoint import Checkpoint
from cat_plugin.ptq.learned.descent import Outcome
from cat_plugin.ptq.pipeline import STAGES, run_stages
from cat_plugin.ptq.progress import Reporter
from cat_plugin.ptq.rows import Inputs
from cat_plugin.ptq.stages.stage import Stage, Step
from cat_plugin.ptq.state import State
from tests.ptq.models import SmallResNet, randomise, small_inputs

PREPARATION = STAGES[:5]


def names(**options):
    return [stage.name for stage in STAGES if stage.applies(QuantSpec(**options))]


def test_a_specification_chooses_its_stages():
    always = ["trace", "lengths", "fold", "transforms", "insert", "units", "lower"]
    assert names(preset="fast") == always
    assert names(preset="balanced") == [*always[:-1], "refinement", "lower"]
    assert names(preset="best", unit="pack", weight_budget=3.0) == [
        *always[:-2], "bits", "packs", "units", "model", "refinement", "lower"
    ]  # fmt: skip
    assert "packs" not in names(preset="fast", unit="pack")
    assert names(preset="fast", smoothing="lrquant") == always
    assert names(preset="fast", smoothing="lrquant", smoothing_epochs=1) == [
        *always[:4],
        "smoothing",
        *always[4:],
    ]
    assert "smoothing" in names(preset="balanced", smoothing="omniquant")
    assert "smoothing" not in names(preset="balanced", smoothing="repq")
    assert len({stage.name for stage in STAGES}) == len(STAGES)


class Twice(Stage):
    """Two steps, of which the second has trained something."""

    name = "twice"

    def __init__(self):
        self.runs = 0

    def applies(self, spec):
        return True

    def work(self, state):
        return 4.0

    def run(self, state):
        self.runs += 1
        yield Step("one", "twice", work=1.0, notes=("a note",))
        state.reporter.advance("two", 2.0)
        yield Step(self.name, self.name, Outcome(2.0, 1.0, 5, "why"), work=3.0)


def run(stage, checkpoint=None, events=None):
    model, x = randomise(SmallResNet()), small_inputs(16, 3, 12, 12)
    cpu = torch.device("cpu")
    with TensorStore() as store, torch.no_grad():
        state = State(
            model,
            QuantSpec(),
            Inputs.of(x),
            cpu,
            cpu,
            store,
            Reporter(None if events is None else events.append),
        )
        run_stages(state, checkpoint, (*PREPARATION, stage))
    return state


def test_the_loop_enters_a_step_in_report_notes_and_progress():
    events = []
    state = run(Twice(), events=events)
    assert [(unit.name, unit.kind, unit.loss_after) for unit in state.units] == [("twice", "twice", 1.0)]
    assert state.notes == ["a note", "twice twice: why"]
    told = [(event.stage, event.fraction) for event in events if event.stage != "two"]  # if it took its time
    begun = [(stage.name, 0.0) for stage in (*PREPARATION, Twice()) if stage.applies(QuantSpec())]
    assert told == [*begun, ("one", 0.25), ("twice", 1.0)]


def test_a_stage_that_the_checkpoint_holds_is_not_run_again(tmp_path):
    stage = Twice()
    for _ in range(2):
        checkpoint = Checkpoint(tmp_path, "key")
        state = run(stage, checkpoint)
        checkpoint.close()
        assert [unit.name for unit in state.units] == ["twice"]
        assert state.reporter.done == 4.0
        assert state.reporter.share == 1.0
    assert stage.runs == 1
    assert json.loads((tmp_path / "state.json").read_text())["finished"] == ["twice one", "twice", "complete"]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_only_stages_in_front_of_the_checkpoint_or_behind_it_are_done_anew(stage):
    assert stage.checkpointed == (stage.name in ("bits", "packs", "units", "model", "refinement"))
