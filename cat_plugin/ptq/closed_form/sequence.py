"""The pass over the graph: layer by layer in closed form, unit by unit trained, each on what precedes it quantized."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cat_plugin.ptq.cache import TensorStore
from cat_plugin.ptq.closed_form.layer_fit import fit_layer
from cat_plugin.ptq.graph.executor import Executor, first_inputs, last_uses
from cat_plugin.ptq.graph.insert import Prepared
from cat_plugin.ptq.graph.modules import QuantOp
from cat_plugin.ptq.graph.units import Unit
from cat_plugin.ptq.learned.soft_unit import float_call
from cat_plugin.ptq.quantizers.observers import search_activation_range, subsample
from cat_plugin.ptq.quantizers.uniform import ActQuantizer
from cat_plugin.ptq.report import LayerReport
from cat_plugin.ptq.spec import QuantSpec

__all__ = ["generator_for", "quantize_in_order"]

_SAMPLE = 1 << 17


def generator_for(seed: int, stage: str) -> torch.Generator:
    """Generator that depends on the seed and on what it is for only, so that a resumed run draws the same numbers."""
    number = seed & 0xFFFFFFFF
    for character in stage:
        number = (number * 1000003 + ord(character)) & 0x7FFFFFFFFFFFFFFF
    return torch.Generator().manual_seed(number)


def quantize_in_order(
    prepared: Prepared,
    inputs: Tensor,
    spec: QuantSpec,
    store: TensorStore,
    *,
    units: Sequence[Unit] = (),
    train: Callable[[Unit, Tensor, Tensor, Tensor], None] | None = None,
    finished: Callable[[Unit], None] | None = None,
    reports: list[LayerReport] | None = None,
    fitted: int | None = None,
) -> tuple[list[LayerReport], Tensor]:
    """Choose every range and every integer in one pass, in place; what has been chosen already stays.

    Parameters
    ----------
    prepared : Prepared
        Graph with quantizers.
    inputs : Tensor
        (N, ...) calibration inputs.
    spec : QuantSpec
        What was asked for.
    store : TensorStore
        Where values are kept.
    units : sequence of Unit
        Stretches of the graph, in order.
    train : callable or None
        Called with (unit, quantized inputs, full-precision inputs, full-precision outputs) as soon as a unit's layers
        are fitted; what follows sees the outputs of the trained unit.
    finished : callable or None
        Called with each unit that is done.
    reports : list of LayerReport or None
        Appended to as layers are fitted.
    fitted : int or None
        Inputs, the first ones, that ranges and layers are fitted to; None is all.

    Returns
    -------
    layers : list of LayerReport
        ``reports``.
    logits : Tensor
        (N, C) full-precision result.
    """
    module = prepared.module
    full = Executor(module, inputs, spec.batch_size, store, float_call)
    quantized = Executor(module, inputs, spec.batch_size, store, lambda child, x: child(x))
    reports = [] if reports is None else reports
    ends = {unit.output: unit for unit in units}
    uses = last_uses(module.graph, {unit.output: unit.source for unit in units})
    logits: Tensor | None = None
    count = len(inputs) if fitted is None else fitted

    for node in module.graph.nodes:
        unit, dying = ends.get(node), uses.get(node, [])
        free = [
            n for n in dying if unit is None or n is not unit.source
        ]  # what training needs is not written over
        child = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(child, ActQuantizer):
            source = node.args[0]
            if not child.ready:
                value = first_inputs(quantized.gathered(source), count, len(inputs))
                sample = subsample(value, _SAMPLE, generator_for(spec.seed, node.name))
                child.set_range(*search_activation_range(sample, child.bits, spec.symmetric_activations))
            if source in full.values:
                full.set(node, full.values[source])
            quantized.run(node, free)
        elif isinstance(child, QuantOp):
            full.run(node)
            if child.q_weight is None:
                generator = generator_for(spec.seed, child.name)
                reports.append(fit_layer(node, child, full, quantized, spec, generator, count))
            else:
                quantized.run(node)
        elif node.op == "output":
            logits = full.values[node.args[0]].clone()
        else:
            full.run(node, free)
            quantized.run(node, free)
        if unit is not None:
            if train is not None:
                train(unit, quantized.values[unit.source], full.values[unit.source], full.values[node])
                quantized.run_stretch(unit.nodes, node)
            if finished is not None:
                finished(unit)
        for executor in (full, quantized):
            executor.drop(dying)
    assert logits is not None
    return reports, logits
