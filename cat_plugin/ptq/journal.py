"""What is kept of a run as its steps finish: report, checkpoint, progress."""

from __future__ import annotations

import dataclasses

from cat_plugin.ptq.checkpoint import Checkpoint
from cat_plugin.ptq.report import LayerReport, UnitReport
from cat_plugin.ptq.stages.stage import Step
from cat_plugin.ptq.state import State

__all__ = ["Journal"]


class Journal:
    """Keeps the account of one run.

    Parameters
    ----------
    state : State
        Whose reports, notes and reporter are kept up.
    checkpoint : Checkpoint or None
        Where the state is written behind each step.
    """

    def __init__(self, state: State, checkpoint: Checkpoint | None) -> None:
        self.state, self.checkpoint = state, checkpoint

    def restore(self) -> None:
        """Take over what an interrupted run has left in the checkpoint; the graph has its quantizers."""
        state, checkpoint = self.state, self.checkpoint
        if checkpoint is None or not checkpoint.finished or state.finished:
            return
        checkpoint.restore(state.module)
        records = checkpoint.records
        state.finished = list(checkpoint.finished)
        state.layers = [
            LayerReport(**{**record, "weight_shape": tuple(record["weight_shape"])})
            for record in records["layers"]
        ]
        state.units = [UnitReport(**record) for record in records["units"]]
        state.notes = list(records["notes"])
        state.packs = [(start, end) for start, end in records["packs"]]

    def record(self, step: Step) -> None:
        """Enter a finished step everywhere."""
        state, outcome = self.state, step.outcome
        if step.resumed:
            state.reporter.skip(step.work)
            return
        state.notes += step.notes
        if outcome is not None:
            note = outcome.note
            state.units.append(
                UnitReport(step.name, step.kind, outcome.before, outcome.after, outcome.steps, note)
            )
            if note:
                state.notes.append(f"{step.kind} {step.name}: {note}")
        before, after = (None, None) if outcome is None else (outcome.before, outcome.after)
        state.reporter.finish(step.name, before, after, step.work)
        if step.saved and self.checkpoint is not None:
            self.checkpoint.records = {
                "layers": [dataclasses.asdict(layer) for layer in state.layers],
                "units": [dataclasses.asdict(unit) for unit in state.units],
                "notes": state.notes,
                "packs": state.packs,
            }
            self.checkpoint.save(state.module, step.key)
