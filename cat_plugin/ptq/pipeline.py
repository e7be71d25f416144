"""The stages of a quantization in their order, with what was done kept for the report and the checkpoint.

1. bit-widths under a budget, if there is one; 2. layers in closed form, units trained as their layers are there;
3. packs, if units are packs: the blocks are scored after a closed-form pass and trained pack by pack; 4. the whole model
on its logits; 5. CAT's refinement of scales and zero points.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cat_plugin.ptq.cache import TensorStore
from cat_plugin.ptq.checkpoint import Checkpoint
from cat_plugin.ptq.closed_form.mixed_precision import choose_bits, unit_costs
from cat_plugin.ptq.closed_form.sequence import generator_for, quantize_in_order
from cat_plugin.ptq.graph.insert import Prepared
from cat_plugin.ptq.graph.ops import is_batched
from cat_plugin.ptq.graph.packs import group_by_score, join_units, pack_scores
from cat_plugin.ptq.graph.units import Unit, find_units, whole_model
from cat_plugin.ptq.learned.augment import looks_like_images
from cat_plugin.ptq.learned.logit_training import LogitTraining, train_on_logits
from cat_plugin.ptq.learned.losses import fisher_weights, prediction_difference
from cat_plugin.ptq.learned.precision import bf16_is_faster
from cat_plugin.ptq.learned.reconstruction import (
    Outcome,
    Reconstruction,
    parameter_groups,
    reconstruct,
    watched_rows,
)
from cat_plugin.ptq.learned.refinement import refine
from cat_plugin.ptq.learned.rounding import SoftLayer
from cat_plugin.ptq.learned.soft_unit import SoftUnit
from cat_plugin.ptq.presets import Plan, plan
from cat_plugin.ptq.progress import Progress, Reporter
from cat_plugin.ptq.report import LayerReport, UnitReport
from cat_plugin.ptq.spec import QuantSpec

__all__ = ["run_stages"]

_SCORING_ROWS = 128
_STEP_ELEMENTS = 1 << 21


class _Run:
    """State of one run."""

    def __init__(
        self,
        prepared: Prepared,
        inputs: Tensor,
        spec: QuantSpec,
        store: TensorStore,
        progress: Callable[[Progress], None] | None,
        checkpoint: Checkpoint | None,
    ) -> None:
        self.prepared, self.module, self.inputs, self.spec = prepared, prepared.module, inputs, spec
        self.store, self.checkpoint, self.plan = store, checkpoint, plan(spec)
        self.layers: list[LayerReport] = []
        self.units: list[UnitReport] = []
        self.notes: list[str] = []
        self.packs: list[tuple[int, int]] = []
        self.reporter = Reporter(progress, _work(len(prepared.layers), self.plan))

    def save(self, stage: str) -> None:
        if self.checkpoint is not None:
            self.checkpoint.records = {
                "layers": [dataclasses.asdict(layer) for layer in self.layers],
                "units": [dataclasses.asdict(unit) for unit in self.units],
                "notes": self.notes,
                "packs": self.packs,
            }
            self.checkpoint.save(self.module, stage)

    def done(self, stage: str) -> bool:
        return self.checkpoint is not None and stage in self.checkpoint.finished

    def load(self) -> None:
        if self.checkpoint is None or not self.checkpoint.finished:
            return
        self.checkpoint.restore(self.module)
        records = self.checkpoint.records
        self.layers = [
            LayerReport(**{**r, "weight_shape": tuple(r["weight_shape"])}) for r in records["layers"]
        ]
        self.units = [UnitReport(**r) for r in records["units"]]
        self.notes = list(records["notes"])
        self.packs = [(start, end) for start, end in records["packs"]]

    def record(self, name: str, outcome: Outcome, kind: str) -> None:
        self.units.append(UnitReport(name, kind, outcome.before, outcome.after, outcome.steps, outcome.note))
        if outcome.note:
            self.notes.append(f"{kind} {name}: {outcome.note}")
        self.reporter.finish(name, outcome.before, outcome.after)


def _work(layers: int, steps: Plan) -> float:
    # a layer in closed form costs about as much as 30 gradient steps on it; one in the whole model twice a unit's
    return layers * (30.0 + steps.unit_steps + 2.0 * (steps.model_steps + steps.refinement_steps))


def run_stages(
    prepared: Prepared,
    inputs: Tensor,
    spec: QuantSpec,
    store: TensorStore,
    progress: Callable[[Progress], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> tuple[list[LayerReport], list[UnitReport], list[str]]:
    """Do everything between the insertion of quantizers and the QDQ graph, in place.

    Parameters
    ----------
    prepared : Prepared
        Graph with quantizers.
    inputs : Tensor
        (N, ...) calibration inputs on the device to compute on.
    spec : QuantSpec
        What was asked for.
    store : TensorStore
        Where activations are cached.
    progress : callable or None
        Gets reports.
    checkpoint : Checkpoint or None
        Where the state is kept.

    Returns
    -------
    layers : list of LayerReport
    units : list of UnitReport
    notes : list of str
    """
    run = _Run(prepared, inputs, spec, store, progress, checkpoint)
    run.load()
    granularity = "layer" if spec.unit == "layer" else "block"
    units = find_units(run.module, spec.units, granularity)
    if spec.weight_budget is not None and not run.done("bits"):
        _mixed_precision(run, units)
    if spec.unit == "pack" and run.plan.unit_steps:
        logits = _pass(run, _packs(run, units), train=True)
    else:
        logits = _pass(run, units, train=run.plan.unit_steps > 0)
    whole = whole_model(run.module)
    if run.plan.model_steps and not run.done("model"):
        with torch.enable_grad():
            run.record("model", _train_model(run, whole, logits), "model")
        run.save("model")
    if run.plan.refinement_steps and not run.done("refinement"):
        settings = _on_logits(run, whole, run.plan.refinement_steps)
        generator = generator_for(spec.seed, "refinement")
        with torch.enable_grad():
            outcome = refine(
                run.module,
                whole,
                inputs,
                logits,
                settings,
                generator,
                penalty=spec.refinement_penalty,
                bf16=_bf16(run),
            )
        run.record("refinement", outcome, "refinement")
        run.save("refinement")
    return run.layers, run.units, run.notes


def _packs(run: _Run, units: list[Unit]) -> list[Unit]:
    if not run.done("packs"):
        _pass(run, units, train=False)
        run.packs = group_by_score(pack_scores(run.module, units, run.inputs[:_SCORING_ROWS]))
        for layer in run.prepared.layers:  # each pack is fitted anew on what the trained packs before it give
            layer.weight, layer.bias, layer.q_weight = layer.float_weight, layer.float_bias, None
        for unit in units:
            for quantizer in unit.quantizers:
                quantizer.ready = False
        run.layers.clear()
        packs = join_units(units, run.packs)
        run.notes.append("packs: " + ", ".join(f"{pack.name} ({len(pack.layers)} layers)" for pack in packs))
        run.save("packs")
    return join_units(units, run.packs)


def _bf16(run: _Run) -> bool:
    return bf16_is_faster(run.inputs.device) if run.spec.bf16 is None else run.spec.bf16


def _augments(run: _Run) -> bool:
    return looks_like_images(run.inputs) if run.spec.augment is None else run.spec.augment


def _on_logits(run: _Run, whole: Unit, steps: int) -> LogitTraining:
    rows = 32  # images, not positions, are the examples here: what is too large goes through in pieces
    return LogitTraining(steps, rows, run.spec.temperature, augment=_augments(run), piece=_rows(whole, rows))


def _mixed_precision(run: _Run, units: list[Unit]) -> None:
    spec = run.spec
    assert spec.weight_budget is not None
    fixed = {layer for layer in run.prepared.layers if layer.w_bits != spec.w_bits}
    free = [dataclasses.replace(u, layers=[x for x in u.layers if x not in fixed]) for u in units]
    free = [unit for unit in free if unit.layers]
    sizes = [sum(layer.weight.numel() for layer in unit.layers) for unit in free]
    candidates = sorted(set(spec.weight_candidates))
    symmetric = spec.symmetric_weights
    costs = unit_costs(run.module, free, run.inputs[:_SCORING_ROWS], candidates, symmetric)
    for unit, bits in zip(free, choose_bits(costs, sizes, candidates, spec.weight_budget), strict=True):
        for layer in unit.layers:
            layer.w_bits = bits
        run.notes.append(f"mixed precision: {unit.name} has {bits}-bit weights")
    run.save("bits")


def _rows(unit: Unit, most: int) -> int:
    """Rows of a training step: as many as keep the unit's largest activation within a cache's reach.

    Large feature maps hold many positions, each of which is an example to a convolution, so that few images do.
    """
    sizes = [math.prod(node.meta["val"].shape[1:]) for node in unit.nodes if is_batched(node)]
    return max(min(_STEP_ELEMENTS // max(sizes, default=1), most), min(4, most))


def _pass(run: _Run, units: list[Unit], train: bool) -> Tensor:
    spec = run.spec
    settings = Reconstruction(
        steps=run.plan.unit_steps,
        method="adaround" if spec.rounding == "adaround" else "straight_through",
        learn_rounding=spec.rounding != "none",
        learn_steps=spec.learned_steps,
        drop_probability=spec.drop_probability,
        input_mix=spec.input_mix,
        bf16=_bf16(run),
    )

    def trained(unit: Unit, x: Tensor, x_full: Tensor, y: Tensor) -> None:
        stage = f"unit {unit.name}"
        if run.done(stage):
            run.reporter.skip(len(unit.layers) * settings.steps)
            return
        if len(unit.layers) == 1 and unit.output is whole_model(run.module).output:
            return  # the logits' own layer: closed form is the best mean squared error there is
        if all(layer.w_bits >= 8 for layer in unit.layers) and all(q.bits >= 8 for q in unit.quantizers):
            return  # nothing to gain at 8 bits
        weights = fisher_weights(run.module, unit, y, spec.batch_size) if spec.loss == "fisher" else None
        guidance = prediction_difference(run.module, unit, y, spec.guidance, spec.temperature)
        with torch.enable_grad():
            outcome = reconstruct(
                run.module,
                unit,
                x,
                x_full,
                y,
                dataclasses.replace(settings, batch_size=_rows(unit, settings.batch_size)),
                generator_for(spec.seed, stage),
                weights=weights,
                guidance=guidance,
                tick=lambda _: run.reporter.advance(unit.name, len(unit.layers)),
            )
        run.record(unit.name, outcome, "unit")

    def finished(unit: Unit) -> None:
        run.reporter.done += 30.0 * len(unit.layers)
        if not train:
            run.reporter.finish(unit.name, None, None)
        elif not run.done(f"unit {unit.name}"):
            run.save(f"unit {unit.name}")

    # reports of layers come layer by layer, so that a checkpoint after a unit holds those of its layers
    _, logits = quantize_in_order(
        run.prepared,
        run.inputs,
        spec,
        run.store,
        units=units,
        train=trained if train else None,
        finished=finished,
        reports=run.layers,
        fitted=len(run.inputs) - watched_rows(len(run.inputs)) if train else None,
    )
    return logits


def _train_model(run: _Run, whole: Unit, logits: Tensor) -> Outcome:
    spec = run.spec
    method = "adaround" if spec.rounding == "adaround" else "straight_through"
    soft = SoftUnit(run.module, whole, lambda layer: SoftLayer(layer, method), bf16=_bf16(run))
    rates = Reconstruction(
        learn_rounding=spec.rounding != "none",
        learn_steps=spec.learned_steps,
        weight_rate=5e-3,  # slower than a unit's: a weight that jumps is felt by everything behind it
        bias_rate=1e-3,
    )
    groups: list[dict[str, Any]] = parameter_groups(soft, rates)
    settings = _on_logits(run, whole, run.plan.model_steps)
    generator = generator_for(spec.seed, "model")
    tick = len(run.prepared.layers) * 2.0
    return train_on_logits(
        soft,
        groups,
        run.inputs,
        logits,
        settings,
        generator,
        tick=lambda _: run.reporter.advance("model", tick),
    )
