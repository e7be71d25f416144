"""The stages of a quantization in their order: the table of contents of the engine."""

from __future__ import annotations

from collections.abc import Sequence

from cat_plugin.ptq.checkpoint import Checkpoint
from cat_plugin.ptq.journal import Journal
from cat_plugin.ptq.stages.bits import BitsUnderBudget
from cat_plugin.ptq.stages.equivalent import EquivalentTransforms
from cat_plugin.ptq.stages.preparation import AnyLength, FoldBatchNorm, InsertQuantizers, Lower, Trace
from cat_plugin.ptq.stages.smoothing import TrainedSmoothing
from cat_plugin.ptq.stages.stage import Stage
from cat_plugin.ptq.stages.units import ChoosePacks, FitUnits
from cat_plugin.ptq.stages.whole_model import Refinement, WholeModel
from cat_plugin.ptq.state import State

__all__ = ["STAGES", "run_stages"]

STAGES: tuple[Stage, ...] = (
    Trace(),
    AnyLength(),
    FoldBatchNorm(),
    EquivalentTransforms(),
    TrainedSmoothing(),
    InsertQuantizers(),
    BitsUnderBudget(),
    ChoosePacks(),
    FitUnits(),
    WholeModel(),
    Refinement(),
    Lower(),
)


def run_stages(state: State, checkpoint: Checkpoint | None = None, stages: Sequence[Stage] = STAGES) -> None:
    """Run every stage that the specification asks for, in place; what the checkpoint holds is not done again.

    Parameters
    ----------
    state : State
        Of a run that begins; afterwards with the QDQ graph and the reports.
    checkpoint : Checkpoint or None
        Where the state is kept.
    stages : sequence of Stage
        In order.
    """
    journal = Journal(state, checkpoint)
    chosen = [stage for stage in stages if stage.applies(state.spec)]
    for index, stage in enumerate(chosen):
        state.reporter.total = state.reporter.done + sum(each.work(state) for each in chosen[index:])
        journal.restore()
        if stage.checkpointed and (journal.complete or stage.name in state.finished):
            state.reporter.skip(stage.work(state))
            continue
        state.reporter.enter(stage.name)
        for step in stage.run(state):
            journal.record(step)
        if stage.exact(state):
            state.equivalence.check(stage.name, state.module, locate=stage.keeps_values)
        state.store.trim()
        if stage.checkpointed and not any(later.checkpointed for later in chosen[index + 1 :]):
            journal.finish()
