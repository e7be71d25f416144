"""Bit-widths of the weights under a size budget, before anything is fitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from cat_plugin.ptq.closed_form.mixed_precision import choose_bits, unit_costs
from cat_plugin.ptq.spec import QuantSpec
from cat_plugin.ptq.stages.stage import Stage, Step
from cat_plugin.ptq.state import State

__all__ = ["BitsUnderBudget"]

_ROWS = 128  # calibration inputs that the damage of a width is measured on


class BitsUnderBudget(Stage):
    """Each unit's weight bits, where ``weight_budget`` bounds their mean; widths set by name stay."""

    name = "bits"

    def applies(self, spec: QuantSpec) -> bool:
        return spec.weight_budget is not None

    def run(self, state: State) -> Iterator[Step]:
        spec = state.spec
        assert spec.weight_budget is not None
        fixed = {layer for layer in state.prepared.layers if layer.w_bits != spec.w_bits}
        units = [
            dataclasses.replace(unit, layers=[layer for layer in unit.layers if layer not in fixed])
            for unit in state.blocks()
        ]
        units = [unit for unit in units if unit.layers]
        sizes = [sum(layer.weight.numel() for layer in unit.layers) for unit in units]
        candidates = sorted(set(spec.weight_candidates))
        rows, symmetric = state.inputs.leading(_ROWS), spec.symmetric_weights
        costs = unit_costs(state.module, units, rows, candidates, symmetric, state.quality)
        chosen = choose_bits(costs, sizes, candidates, spec.weight_budget)
        for unit, bits in zip(units, chosen, strict=True):
            for layer in unit.layers:
                layer.w_bits = bits
        notes = (
            f"mixed precision: {unit.name} has {bits}-bit weights"
            for unit, bits in zip(units, chosen, strict=True)
        )
        yield Step(self.name, self.name, notes=tuple(notes))
