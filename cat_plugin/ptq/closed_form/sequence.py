"""The pass over the graph: layer by layer in closed form, unit by unit trained, each on what precedes it quantized."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from cat_plugin.ptq.cache import TensorStore
from cat_plugin.ptq.closed_form.layer_fit import fit_layer
from cat_plugin.ptq.graph.executor import Executor, first_inputs, last_uses
from cat_plugin.ptq.graph.insert import Prepared
from cat_plugin.ptq.graph.modules import QuantOp
from cat_plugin.ptq.graph.ops import tensor_outputs
from cat_plugin.ptq.graph.units import Unit
from cat_plugin.ptq.learned.soft_unit import float_call
from cat_plugin.ptq.quantizers.observers import search_activation_range, subsample
from cat_plugin.ptq.quantizers.uniform import ActQuantizer
from cat_plugin.ptq.report import LayerReport
from cat_plugin.ptq.rows import Rows
from cat_plugin.ptq.spec import QuantSpec

__all__ = ["FittedUnit", "SequentialFit", "generator_for"]

_SAMPLE = 1 << 17


def generator_for(seed: int, stage: str) -> torch.Generator:
    """Generator that depends on the seed and on what it is for only, so that a resumed run draws the same numbers."""
    number = seed & 0xFFFFFFFF
    for character in stage:
        number = (number * 1000003 + ord(character)) & 0x7FFFFFFFFFFFFFFF
    return torch.Generator().manual_seed(number)


@dataclass(frozen=True)
class FittedUnit:
    """A unit whose layers are fitted.

    Attributes
    ----------
    unit : Unit
        With ranges and integers chosen.
    inputs, full_inputs : Rows
        (N, ...) what the quantized and the full-precision network feed to it.
    targets : Rows
        (N, ...) its full-precision outputs.
    """

    unit: Unit
    inputs: Rows
    full_inputs: Rows
    targets: Rows


class SequentialFit:
    """Chooses every range and every integer in one pass, in place; what has been chosen already stays.

    Parameters
    ----------
    prepared : Prepared
        Graph with quantizers.
    inputs : Tensor or Rows
        (N, ...) calibration inputs.
    spec : QuantSpec
        What was asked for.
    store : TensorStore
        Where values are kept.
    reports : list of LayerReport or None
        Appended to as layers are fitted.
    fitted : int or None
        Inputs, the first ones, that ranges and layers are fitted to; None is all.
    changed : bool
        Whether the caller changes a unit as soon as it is fitted: what follows then sees its outputs computed anew.

    Attributes
    ----------
    reports : list of LayerReport
        Of the layers fitted, in order.
    results : dict of fx.Node to Tensor
        (N, ...) full-precision results, once the pass is over.
    """

    def __init__(
        self,
        prepared: Prepared,
        inputs: Tensor | Rows,
        spec: QuantSpec,
        store: TensorStore,
        *,
        reports: list[LayerReport] | None = None,
        fitted: int | None = None,
        changed: bool = False,
    ) -> None:
        self.module, self.spec, self.changed = prepared.module, spec, changed
        self.full = Executor(self.module, inputs, spec.batch_size, store, float_call)
        self.quantized = Executor(self.module, inputs, spec.batch_size, store, lambda child, x: child(x))
        self.reports = [] if reports is None else reports
        self.count = len(inputs) if fitted is None else fitted
        self.results: dict[fx.Node, Tensor] = {}

    def run(self, units: Sequence[Unit] = ()) -> Iterator[FittedUnit]:
        """Go through the graph; each of the ``units``, in order, is yielded when its layers are fitted."""
        full, quantized = self.full, self.quantized
        ends = {unit.output: unit for unit in units}
        uses = last_uses(
            self.module.graph, {unit.output: (*unit.sources, *unit.outputs[:-1]) for unit in units}
        )
        for node in self.module.graph.nodes:
            unit, dying = ends.get(node), uses.get(node, [])
            # what training needs is not written over
            free = [n for n in dying if unit is None or n not in (*unit.sources, *unit.outputs)]
            self._visit(node, free)
            if unit is not None:
                yield FittedUnit(
                    unit,
                    Rows([quantized.values[n] for n in unit.sources]),
                    Rows([full.values[n] for n in unit.sources]),
                    Rows([full.values[n] for n in unit.outputs]),
                )
                if self.changed:
                    quantized.run_stretch(unit.nodes, unit.outputs)
            for executor in (full, quantized):
                executor.drop(dying)

    def _visit(self, node: fx.Node, free: Sequence[fx.Node]) -> None:
        """Fit what the node holds and compute its value; values of ``free`` nodes may be written over."""
        full, quantized, spec = self.full, self.quantized, self.spec
        child = self.module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(child, ActQuantizer):
            source = node.all_input_nodes[0]
            if not child.ready:
                value = first_inputs(quantized.gathered(source), self.count, full.count)
                sample = subsample(value, _SAMPLE, generator_for(spec.seed, node.name))
                child.set_range(*search_activation_range(sample, child.bits, spec.symmetric_activations))
            if source in full.values:
                full.set(node, full.values[source])
            quantized.run(node, free)
        elif isinstance(child, QuantOp):
            full.run(node)
            if child.q_weight is None:
                generator = generator_for(spec.seed, child.name)
                report = fit_layer(node, child, full, quantized, spec, generator, self.count)
                self.reports.append(report)
            else:
                quantized.run(node)
        elif node.op == "output":
            self.results = {n: full.values[n].clone() for n in tensor_outputs(self.module.graph)}
        else:
            full.run(node, free)
            quantized.run(node, free)
