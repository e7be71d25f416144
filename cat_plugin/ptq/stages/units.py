"""Layers in closed form, and units trained as soon as their layers are there."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx

from cat_plugin.ptq.closed_form.importance import importance_of_positions
from cat_plugin.ptq.closed_form.sequence import FittedUnit, SequentialFit, generator_for
from cat_plugin.ptq.graph.ops import row_bytes, tensor_outputs
from cat_plugin.ptq.graph.packs import group_by_score, join_units, pack_scores
from cat_plugin.ptq.learned.descent import Outcome, held_out_rows
from cat_plugin.ptq.learned.losses import (
    Tail,
    curvature_directions,
    curvature_weights,
    fisher_weights,
    prediction_difference,
)
from cat_plugin.ptq.learned.reconstruction import Reconstruction, reconstruct, rows_of_a_step
from cat_plugin.ptq.learned.rounding import rounding_for
from cat_plugin.ptq.memory import expected
from cat_plugin.ptq.presets import plan
from cat_plugin.ptq.rows import Rows
from cat_plugin.ptq.spec import QuantSpec
from cat_plugin.ptq.stages.stage import CLOSED_FORM_WORK, Stage, Step
from cat_plugin.ptq.state import State

__all__ = ["ChoosePacks", "FitUnits"]

_log = logging.getLogger("cat_plugin")

_PASS = 16  # inputs in a pass with gradients through the whole model
_SAVED = 1 << 30  # bytes that such a pass keeps for its way back, without a budget
_ROWS = 128  # calibration inputs that blocks are scored on


class ChoosePacks(Stage):
    """Which blocks are trained together: scored after a pass in closed form, which is then undone."""

    name = "packs"

    def applies(self, spec: QuantSpec) -> bool:
        return spec.unit == "pack" and plan(spec).unit_steps > 0

    def work(self, state: State) -> float:
        return CLOSED_FORM_WORK * state.layer_count

    def run(self, state: State) -> Iterator[Step]:
        units = state.blocks()
        fit = SequentialFit(state.prepared, state.inputs, state.spec, state.store, weights=_weights(state))
        for fitted in fit.run(units):
            work = CLOSED_FORM_WORK * len(fitted.unit.layers)
            yield Step(fitted.unit.name, "score", work=work, saved=False)
        state.packs = group_by_score(pack_scores(state.module, units, state.inputs[:_ROWS], state.quality))
        for (
            layer
        ) in state.prepared.layers:  # each pack is fitted anew on what the trained packs before it give
            layer.weight, layer.bias, layer.q_weight = layer.float_weight, layer.float_bias, None
        for unit in units:
            for quantizer in unit.quantizers:
                quantizer.ready = False
        packs = join_units(units, state.packs)
        note = "packs: " + ", ".join(f"{pack.name} ({len(pack.layers)} layers)" for pack in packs)
        yield Step(self.name, self.name, notes=(note,))


class FitUnits(Stage):
    """Every range and every integer, in one pass over the graph, each layer on what precedes it quantized."""

    name = "units"

    def applies(self, spec: QuantSpec) -> bool:
        return True

    def work(self, state: State) -> float:
        return state.layer_count * (CLOSED_FORM_WORK + state.plan.unit_steps)

    def run(self, state: State) -> Iterator[Step]:
        count, steps = len(state.inputs), state.plan.unit_steps
        foreseen = expected(state.module, count, state.spec.batch_size, state.store.budget)
        state.store.reserve(foreseen.working)
        state.reporter.enter(f"{self.name}, {foreseen}")
        _log.info("fitting the units takes %s beside the model and its inputs", foreseen)
        fit = SequentialFit(
            state.prepared,
            state.inputs,
            state.spec,
            state.store,
            reports=state.layers,
            fitted=count - held_out_rows(count) if state.plan.trains else None,
            changed=steps > 0,
            keeps_results=self._needs_results(state),
            weights=_weights(state),
        )
        units = state.blocks()
        for fitted in fit.run(join_units(units, state.packs) if state.packs else units):
            unit = fitted.unit
            work = len(unit.layers) * (CLOSED_FORM_WORK + steps)
            step = Step(unit.name, "unit", work=work, layers=unit.layers)
            if step.key in state.finished:
                yield dataclasses.replace(step, resumed=True)
            else:
                yield dataclasses.replace(step, outcome=_train(state, fitted, step.key) if steps else None)
            del fitted  # else its values stay in memory, counted by nobody, while the next unit is fitted
        if self._needs_results(state):
            state.logits = Rows([fit.results[n] for n in state.quality.nodes(state.module.graph)])

    @staticmethod
    def _needs_results(state: State) -> bool:
        """Whether this or a later stage trains on full-precision results."""
        return max(state.plan.unit_steps, state.plan.model_steps, state.plan.refinement_steps) > 0


def _weights(state: State) -> dict[fx.Node, Tensor]:
    """How much the positions of the layers' outputs count, where that is asked for."""
    spec, graph = state.spec, state.module.graph
    wanted = spec.position_weights
    if wanted is None:
        wanted = all(node.meta["val"].ndim == 2 for node in state.quality.nodes(graph))
    if not wanted or not (spec.compensation or spec.bias_correction):
        return {}
    generator = generator_for(spec.seed, "importance")
    return importance_of_positions(
        state.module,
        state.inputs,
        state.quality,
        _rows_with_gradients(state),
        generator,
        spec.temperature,
        state.bf16,
    )


def _rows_with_gradients(state: State) -> int:
    """Inputs in a pass with gradients through the whole model: as many as leave memory to others."""
    most = min(state.spec.batch_size, _PASS)
    room = _SAVED if state.store.budget is None else state.store.budget // 3
    return max(1, min(most, room // max(1, sum(map(row_bytes, state.module.graph.nodes)))))


def _output_weights(state: State, tail: Tail, targets: Rows) -> Rows | None:
    """What each element of a unit's outputs counts for in its loss; None counts all alike."""
    spec = state.spec
    if spec.loss == "fisher":
        return fisher_weights(tail, targets, spec.batch_size)
    if spec.loss in ("curvature", "fima"):
        return curvature_weights(tail, targets, _rows_with_gradients(state), spec.temperature)
    return None


def _guidance(state: State, tail: Tail, targets: Rows) -> Callable[[Rows, Tensor], Tensor] | None:
    """What a unit's loss has beside the weighted squared error; None for nothing."""
    spec = state.spec
    terms = [prediction_difference(tail, targets, spec.guidance, spec.temperature)]
    if spec.loss == "fima":
        terms.append(curvature_directions(tail, targets, _rows_with_gradients(state), spec.temperature))
    chosen = [term for term in terms if term is not None]
    if not chosen:
        return None
    return lambda y, rows: torch.stack([term(y, rows) for term in chosen]).sum()


def _train(state: State, fitted: FittedUnit, key: str) -> Outcome | None:
    """Reconstruct the unit; None where there is nothing to gain."""
    spec, unit, module = state.spec, fitted.unit, state.module
    ends = tensor_outputs(module.graph)
    if len(unit.layers) == 1 and all(n in ends for n in unit.outputs):
        return None  # the results' own layer: closed form is the best mean squared error there is
    if all(layer.w_bits >= 8 for layer in unit.layers) and all(q.bits >= 8 for q in unit.quantizers):
        return None
    rounding = rounding_for(spec.rounding, min((layer.w_bits for layer in unit.layers), default=8))
    settings = Reconstruction(
        steps=state.plan.unit_steps,
        rounding=rounding,
        rates=rounding.rates if spec.learned_steps else dataclasses.replace(rounding.rates, step=None),
        drop_probability=spec.drop_probability,
        input_mix=spec.input_mix,
        bf16=state.bf16,
    )
    given = dict(zip(state.whole().sources, state.inputs.tensors, strict=True))
    tail = Tail(module, unit, state.quality, given)
    return reconstruct(
        module,
        unit,
        fitted.inputs,
        fitted.full_inputs,
        fitted.targets,
        dataclasses.replace(
            settings, batch_size=rows_of_a_step(unit, settings.batch_size, state.inputs.device)
        ),
        generator_for(spec.seed, key),
        weights=_output_weights(state, tail, fitted.targets),
        guidance=_guidance(state, tail, fitted.targets),
        tick=lambda _: state.reporter.advance(unit.name, len(unit.layers)),
    )
