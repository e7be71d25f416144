"""Training against the full-precision logits: the whole model with everything free, then its grids alone."""

from __future__ import annotations

from collections.abc import Iterator

from cat_plugin.ptq.closed_form.sequence import generator_for
from cat_plugin.ptq.graph.units import Unit
from cat_plugin.ptq.learned.logit_training import LogitTraining, train_on_logits
from cat_plugin.ptq.learned.reconstruction import rows_of_a_step
from cat_plugin.ptq.learned.refinement import refine
from cat_plugin.ptq.learned.rounding import FixedIntegers, Rates, Settled, parameter_groups
from cat_plugin.ptq.learned.soft_unit import SoftUnit
from cat_plugin.ptq.presets import plan
from cat_plugin.ptq.spec import QuantSpec
from cat_plugin.ptq.stages.stage import Stage, Step
from cat_plugin.ptq.state import State

__all__ = ["Refinement", "WholeModel"]

_ROWS = 32  # images, not positions, are the examples here: what is too large goes through in pieces
_WORK = 2.0  # of a layer's gradient step in the whole model, in those of a unit


def _settings(state: State, whole: Unit, steps: int) -> LogitTraining:
    temperature, piece = state.spec.temperature, rows_of_a_step(whole, _ROWS, state.inputs.device)
    return LogitTraining(steps, _ROWS, temperature, augment=state.augment, piece=piece)


class WholeModel(Stage):
    """Rounding, steps and biases of all layers trained together."""

    name = "model"

    def applies(self, spec: QuantSpec) -> bool:
        return plan(spec).model_steps > 0

    def work(self, state: State) -> float:
        return _WORK * state.layer_count * state.plan.model_steps

    def run(self, state: State) -> Iterator[Step]:
        spec, whole = state.spec, state.whole()
        rounding = FixedIntegers if spec.rounding == "none" else Settled
        soft = SoftUnit(state.module, whole, rounding, bf16=state.bf16)
        # slower than a unit's: a weight that jumps is felt by everything behind it
        rates = Rates(weight=5e-3, step=1e-3 if spec.learned_steps else None, bias=1e-3)
        outcome = train_on_logits(
            soft,
            parameter_groups(soft, rates),
            state.inputs,
            state.logits,
            _settings(state, whole, state.plan.model_steps),
            generator_for(spec.seed, self.name),
            quality=state.quality,
            tick=lambda _: state.reporter.advance(self.name, _WORK * state.layer_count),
        )
        yield Step(self.name, self.name, outcome, self.work(state))


class Refinement(Stage):
    """CAT's refinement: scales and zero points of all layers, nothing else."""

    name = "refinement"

    def applies(self, spec: QuantSpec) -> bool:
        return plan(spec).refinement_steps > 0

    def work(self, state: State) -> float:
        return _WORK * state.layer_count * state.plan.refinement_steps

    def run(self, state: State) -> Iterator[Step]:
        whole = state.whole()
        outcome = refine(
            state.module,
            whole,
            state.inputs,
            state.logits,
            _settings(state, whole, state.plan.refinement_steps),
            generator_for(state.spec.seed, self.name),
            penalty=state.spec.refinement_penalty,
            quality=state.quality,
            bf16=state.bf16,
            tick=lambda _: state.reporter.advance(self.name, _WORK * state.layer_count),
        )
        yield Step(self.name, self.name, outcome, self.work(state))
