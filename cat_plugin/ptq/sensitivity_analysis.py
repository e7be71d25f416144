"""How much each layer and each block matters: the full-precision model with one of them rounded to nearest.

For every layer three numbers: what rounding its weights does to the prediction, what rounding its input does, and both.
The measure is the divergence ``KL(softmax(z_fp) || softmax(z))`` of the logits, or the error of other results
(:mod:`cat_plugin.ptq.learned.quality`), which needs no label and is what mixed
precision under a budget adds up (:mod:`cat_plugin.ptq.closed_form.mixed_precision`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from cat_plugin.models import device_of, evaluating
from cat_plugin.ptq.calibration import gather_inputs
from cat_plugin.ptq.graph.accept import acceptable
from cat_plugin.ptq.graph.fold import fold_batch_norm, fold_factors
from cat_plugin.ptq.graph.insert import Prepared, insert_quantizers
from cat_plugin.ptq.graph.modules import QuantOp
from cat_plugin.ptq.graph.trace import trace
from cat_plugin.ptq.graph.units import find_units, whole_model
from cat_plugin.ptq.learned.quality import Quality
from cat_plugin.ptq.learned.soft_unit import float_call, run_nodes
from cat_plugin.ptq.quantizers.observers import search_activation_range, search_weight_range, subsample
from cat_plugin.ptq.quantizers.uniform import integer_range
from cat_plugin.ptq.rows import Rows
from cat_plugin.ptq.spec import QuantSpec

__all__ = ["Sensitivity", "rounded", "rows_for", "sensitivity"]

_SAMPLE = 1 << 16  # values of an activation whose range is searched


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing one layer, or one block, alone does to the prediction.

    Attributes
    ----------
    name : str
        Of the layer, or of the block's module.
    kind : str
        ``conv1d``, ``conv2d``, ``linear``; or ``block``.
    w_bits, a_bits : int
        Bits of weights and input; of a block the least among its layers.
    weights : int
        Number of weights.
    weight_divergence, input_divergence, divergence : float
        Mean over rows of ``KL(softmax(z_fp) || softmax(z))``, in nats, or the relative squared error of other results, with the weights, the inputs, or both rounded to
        nearest.
    changed : float
        Share of rows (pixels, tokens) whose class is another with both rounded; 0 where the model gives no logits.
    """

    name: str
    kind: str
    w_bits: int
    a_bits: int
    weights: int
    weight_divergence: float
    input_divergence: float
    divergence: float
    changed: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def rows_for(inputs: Tensor) -> int:
    """How many rows tell enough: 128 small inputs, fewer large ones, never below 16."""
    return min(len(inputs), 128, max(16, (1 << 22) // max(inputs[0].numel(), 1)))


def rounded(values: Tensor, scale: Tensor | float, zero: Tensor | int, bits: int, signed: bool) -> Tensor:
    """Round to the nearest point of a grid; scale and zero point broadcast over the values."""
    low, high = integer_range(bits, signed)
    return (torch.clamp(torch.round(values / scale) + zero, low, high) - zero) * scale


def sensitivity(
    model: nn.Module,
    spec: QuantSpec,
    calibration: Iterable[Any] | Tensor,
    *,
    blocks: bool = True,
    progress: Callable[[str], None] | None = None,
) -> list[Sensitivity]:
    """Measure each layer's and each block's share of the damage that quantization does.

    Parameters
    ----------
    model : nn.Module
        Any whose calls the calibration batches are; left unchanged.
    spec : QuantSpec
        Bits of each layer, exceptions included; nothing is trained or fitted.
    calibration : iterable or Tensor
        Input batches, as for :func:`cat_plugin.ptq.quantize`; of small inputs the first 128 are used.
    blocks : bool
        Whether blocks of more than one layer follow behind the layers.
    progress : callable or None
        Called with the name of each layer and block.

    Returns
    -------
    list of Sensitivity
        The layers in the order of execution, then the blocks.

    Raises
    ------
    CalibrationError, QuantizationError
        As :func:`cat_plugin.ptq.quantize` does.

    Notes
    -----
    A layer costs three passes through what is behind it in the graph.
    """
    model, _ = acceptable(model)
    inputs = gather_inputs(calibration, spec.num_samples)
    inputs = inputs.mapped(lambda x: x.float() if x.is_floating_point() else x)
    rows = min(rows_for(x) for x in inputs.tensors)
    inputs = inputs[:rows].to(device_of(model) or inputs.device)
    with evaluating(model, warn=True), torch.no_grad():
        module = trace(model, inputs[:2])
        quality = Quality.of(module.graph, spec.outputs, spec.logits, spec.class_axis)
        fold_batch_norm(module)
        fold_factors(module)
        prepared = insert_quantizers(module, spec)
        targets = [(layer.name, layer.kind, [layer]) for layer in prepared.layers]
        if blocks:
            units = find_units(module, spec.units)
            targets += [(unit.name, "block", unit.layers) for unit in units if len(unit.layers) > 1]
        measured = _Measurement(prepared, spec, inputs, quality)
        found = []
        for name, kind, layers in targets:
            if progress is not None:
                progress(name)
            found.append(measured.of(name, kind, layers))
    return found


class _Measurement:
    """The prepared graph in full precision on some rows, and anew from a layer on with some of it rounded."""

    def __init__(self, prepared: Prepared, spec: QuantSpec, inputs: Rows, quality: Quality) -> None:
        self.module, self.symmetric, self.quality = prepared.module, spec.symmetric_weights, quality
        starts = range(0, len(inputs), spec.batch_size)
        self.batches = [inputs[start : start + spec.batch_size] for start in starts]
        whole = whole_model(self.module)
        self.sources, self.order = whole.sources, whole.nodes
        self.results = quality.nodes(self.module.graph)
        self.place = {
            child: i
            for i, node in enumerate(self.order)
            if node.op == "call_module"
            and isinstance(child := self.module.get_submodule(str(node.target)), QuantOp)
        }
        self.ranges: dict[QuantOp, tuple[float, int, bool]] = {}
        self.weights: dict[QuantOp, Tensor] = {}

    def of(self, name: str, kind: str, layers: Sequence[QuantOp]) -> Sensitivity:
        """Round these layers together."""
        start = min(self.place[layer] for layer in layers)
        sums = torch.zeros(3, dtype=torch.float64)
        changed = rows = places = 0
        for batch in self.batches:
            env: dict[fx.Node, Any] = dict(zip(self.sources, batch.tensors, strict=True))
            run_nodes(self.module, self.order[:start], env, float_call)
            kept = dict(env)
            run_nodes(self.module, self.order[start:], env, float_call)
            reference = Rows([env[n] for n in self.results])
            for i, (of_weights, of_inputs) in enumerate(((True, False), (False, True), (True, True))):
                env = dict(kept)
                run_nodes(self.module, self.order[start:], env, self._call(layers, of_weights, of_inputs))
                found = Rows([env[n] for n in self.results])
                sums[i] += float(self.quality.error(found, reference, 1.0)) * len(batch)
            others, of = self.quality.changed(found, reference)
            changed, places = changed + others, places + of
            rows += len(batch)
        weight, inputs, both = (sums / rows).tolist()
        return Sensitivity(
            name,
            kind,
            min(layer.w_bits for layer in layers),
            min(layer.a_bits for layer in layers),
            sum(layer.weight.numel() for layer in layers),
            weight,
            inputs,
            both,
            changed / max(places, 1),
        )

    def _call(
        self, layers: Sequence[QuantOp], of_weights: bool, of_inputs: bool
    ) -> Callable[[Any, Tensor], Any]:
        def call(child: Any, x: Tensor) -> Any:
            if child not in layers:
                return float_call(child, x)
            weight = self._rounded_weight(child) if of_weights else child.float_weight
            return child.compute(self._rounded_input(child, x) if of_inputs else x, weight, child.float_bias)

        return call

    def _rounded_weight(self, layer: QuantOp) -> Tensor:
        if layer not in self.weights:
            scale, zero = search_weight_range(
                layer.float_weight, layer.w_bits, self.symmetric or layer.w_bits == 8, layer.group
            )
            self.weights[layer] = rounded(
                layer.float_weight, layer.per_channel(scale), layer.per_channel(zero), layer.w_bits, True
            )
        return self.weights[layer]

    def _rounded_input(self, layer: QuantOp, x: Tensor) -> Tensor:
        if layer not in self.ranges:  # searched on the first batch that comes by
            sample = subsample(x, _SAMPLE, torch.Generator().manual_seed(0)).float()
            self.ranges[layer] = search_activation_range(sample, layer.a_bits, symmetric=False)
        scale, zero, signed = self.ranges[layer]
        return rounded(x, scale, zero, layer.a_bits, signed)
