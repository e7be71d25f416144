"""The pass over the graph: layer by layer in closed form, unit by unit trained, each on what precedes it quantized."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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
from cat_plugin.ptq.quantizers.observers import calibrate
from cat_plugin.ptq.quantizers.uniform import ActQuantizer
from cat_plugin.ptq.report import LayerReport
from cat_plugin.ptq.rows import Rows
from cat_plugin.ptq.spec import QuantSpec

__all__ = ["LARGE_RESULTS", "FittedUnit", "SequentialFit", "generator_for"]

LARGE_RESULTS = 1 << 28
"""Values of the results for all calibration inputs from which on they are not kept unless training asks for them."""


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
        (N, ...) its full-precision outputs, but for results that are not kept.
    """

    unit: Unit
    inputs: Rows
    full_inputs: Rows
    targets: Rows


def _unread(graph: fx.Graph) -> set[fx.Node]:
    """What stands behind the last layers and quantizers, these layers and the output included."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if all(user in found and user.op != "call_module" for user in node.users):
            found.add(node)
    return found


class SequentialFit:
    """Chooses every range and every integer in one pass, in place; what has been chosen already stays.

    Parameters
    ----------
    prepared : Prepared
        Graph with quantizers.
    inputs : Tensor or Rows
        (N, ...) calibration inputs; of several processes each gives its share.
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
    keeps_results : bool
        Whether the results are asked for.  If not, large ones, as a language model's logits are, are computed a batch at a
        time, only for what their own layer is fitted to.
    weights : mapping of fx.Node to Tensor or None
        How much each position of a layer's output counts (:mod:`cat_plugin.ptq.closed_form.importance`).

    Attributes
    ----------
    reports : list of LayerReport
        Of the layers fitted, in order.
    results : dict of fx.Node to Tensor
        (N, ...) full-precision results, once the pass is over; none where they are not kept.
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
        keeps_results: bool = True,
        weights: Mapping[fx.Node, Tensor] | None = None,
    ) -> None:
        self.module, self.spec, self.changed = prepared.module, spec, changed
        self.unread: set[fx.Node] = set()
        row = sum(math.prod(n.meta["val"].shape[1:]) for n in tensor_outputs(self.module.graph))
        self.ranks = Rows.of(inputs).ranks
        if not keeps_results and row * self.ranks.extent(len(inputs)).total > LARGE_RESULTS:
            self.unread = _unread(self.module.graph)
        self.full = Executor(self.module, inputs, spec.batch_size, store, float_call)
        self.quantized = Executor(self.module, inputs, spec.batch_size, store, lambda child, x: child(x))
        self.reports = [] if reports is None else reports
        self.count = len(inputs) if fitted is None else fitted
        self.weights = {} if weights is None else weights
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
                    Rows([full.values[n] for n in unit.outputs if n not in self.unread]),
                )
                if self.changed:
                    quantized.run_stretch(unit.nodes, unit.outputs)
            for executor in (full, quantized):
                executor.drop(dying)
            full.store.trim()

    def _weights_of_reader(self, node: fx.Node) -> Tensor | None:
        """How much positions count for the layer that alone reads a quantizer."""
        weights = [self.weights.get(user) for user in node.users]
        return weights[0][: self.count] if len(weights) == 1 and weights[0] is not None else None

    def _visit(self, node: fx.Node, free: Sequence[fx.Node]) -> None:
        """Fit what the node holds and compute its value; values of ``free`` nodes may be written over."""
        full, quantized, spec = self.full, self.quantized, self.spec
        child = self.module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(child, ActQuantizer):
            source = node.all_input_nodes[0]
            if not child.ready:
                value = first_inputs(quantized.gathered(source), self.count, full.count)
                generator, weights = generator_for(spec.seed, node.name), self._weights_of_reader(node)
                calibrate(child, value, spec.symmetric_activations, generator, weights, self.ranks)
            if source in full.values:
                full.set(node, full.values[source])
            quantized.run(node, free)
        elif isinstance(child, QuantOp):
            kept = node not in self.unread
            if kept:
                full.run(node)
            if child.q_weight is None:
                generator = generator_for(spec.seed, child.name)
                weights = self.weights.get(node)
                report = fit_layer(
                    node,
                    child,
                    full,
                    quantized,
                    spec,
                    generator,
                    self.count,
                    weights,
                    kept=kept,
                    ranks=self.ranks,
                )
                self.reports.append(report)
            elif kept:
                quantized.run(node)
        elif node in self.unread:
            return
        elif node.op == "output":
            self.results = {n: full.values[n].clone() for n in tensor_outputs(self.module.graph)}
        else:
            full.run(node, free)
            quantized.run(node, free)
