"""What is kept of a run as its steps finish: report, checkpoint, progress."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from cat_plugin.ptq.checkpoint import Checkpoint
from cat_plugin.ptq.fitted import fitted_layers, put_back, tensors_of
from cat_plugin.ptq.ranks import Ranks
from cat_plugin.ptq.report import LayerReport, UnitReport
from cat_plugin.ptq.stages.stage import Step
from cat_plugin.ptq.state import State

__all__ = ["COMPLETE", "Journal"]

_log = logging.getLogger("cat_plugin")

#: Key in the checkpoint of a run whose steps are all done.
COMPLETE = "complete"


def _earlier(
    ranks: Ranks, checkpoint: Checkpoint | None
) -> tuple[list[str], dict[str, Any], dict[str, Tensor]]:
    """Steps, records and tensors of an earlier run: what the first process's checkpoint holds, on all of them."""
    if checkpoint is None:
        finished, records, tensors = list[str](), dict[str, Any](), dict[str, Tensor]()
    else:
        finished, records, tensors = list(checkpoint.finished), checkpoint.records, checkpoint.tensors
    if ranks.size > 1:
        finished, records = json.loads(ranks.told(json.dumps([finished, records]).encode()))
        tensors = load(ranks.told(save(tensors))) if finished else {}
    return finished, records, tensors


class Journal:
    """Keeps the account of one run, which may begin with that of an interrupted one.

    Parameters
    ----------
    state : State
        Whose reports, notes and reporter are kept up.
    checkpoint : Checkpoint or None
        Where the state is written behind each step.
    """

    def __init__(self, state: State, checkpoint: Checkpoint | None) -> None:
        self.state, self.checkpoint = state, checkpoint
        self._stored: set[str] = set()  # layers whose integers are in the checkpoint
        self._pending = False
        finished, records, tensors = _earlier(state.inputs.ranks, checkpoint)
        if not finished:
            return
        state.finished, state.kept = finished, tensors
        state.layers = [
            LayerReport(**{**record, "weight_shape": tuple(record["weight_shape"])})
            for record in records["layers"]
        ]
        state.units = [UnitReport(**record) for record in records["units"]]
        state.packs = [(start, end) for start, end in records["packs"]]
        self._note(*records["notes"])
        self._pending = True
        if checkpoint is not None:
            _log.info("%s", self._found(checkpoint))

    def _found(self, checkpoint: Checkpoint) -> str:
        """What there is to go on from."""
        done = self.state.finished
        if self.complete:
            return f"{checkpoint.directory} holds this quantization complete: it is taken from there"
        return (
            f"going on from {checkpoint.directory}: {len(done)} step{'s' if len(done) > 1 else ''} done, the last is "
            f"{done[-1]!r}"
        )

    @property
    def complete(self) -> bool:
        """Whether an earlier run has done every step that a checkpoint holds."""
        return COMPLETE in self.state.finished

    def restore(self) -> None:
        """Put what an interrupted run has chosen into the graph, as soon as that has quantizers."""
        if self._pending and self.state.layer_count:
            put_back(self.state.module, self.state.kept)
            self._stored = set(fitted_layers(self.state.module))
            self.state.kept = {}
            self._pending = False

    def _note(self, *notes: str) -> None:
        """Enter notes; a stage that is done again by a resumed run says the same again."""
        self.state.notes += [note for note in notes if note not in self.state.notes]

    def record(self, step: Step) -> None:
        """Enter a finished step everywhere."""
        state, outcome = self.state, step.outcome
        if step.resumed:
            state.reporter.skip(step.work)
            return
        self._note(*step.notes)
        if outcome is not None:
            note = outcome.note
            state.units.append(
                UnitReport(step.name, step.kind, outcome.before, outcome.after, outcome.steps, note)
            )
            if note:
                self._note(f"{step.kind} {step.name}: {note}")
        before, after = (None, None) if outcome is None else (outcome.before, outcome.after)
        state.reporter.finish(step.name, before, after, step.work)
        if step.saved:
            self._save(step)

    def _save(self, step: Step) -> None:
        if self.checkpoint is None:
            return
        state = self.state
        tensors = {step.kept_name(i): t.detach().cpu().clone() for i, t in enumerate(step.kept)}
        if state.layer_count:
            fitted = fitted_layers(state.module)
            changed = None if step.layers is None else {id(layer) for layer in step.layers}
            written = {n for n, layer in fitted.items() if changed is None or id(layer) in changed}
            tensors |= tensors_of(state.module, written | fitted.keys() - self._stored)
            self._stored = set(fitted)
        records = {
            "layers": [dataclasses.asdict(layer) for layer in state.layers],
            "units": [dataclasses.asdict(unit) for unit in state.units],
            "notes": state.notes,
            "packs": state.packs,
            "share": state.reporter.share,
        }
        self.checkpoint.save(step.key, tensors, records)

    def finish(self) -> None:
        """Every step that a checkpoint holds is done."""
        if not self.complete:
            self._save(Step(COMPLETE, COMPLETE, layers=()))
