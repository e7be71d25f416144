"""One layer in closed form: range, integers and bias from the moments of its inputs and target outputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cat_plugin.ptq.bias_correction import corrected_bias
from cat_plugin.ptq.compensation import fit_integers, least_squares_weight, ridge_by_halves
from cat_plugin.ptq.executor import Executor
from cat_plugin.ptq.modules import QuantOp
from cat_plugin.ptq.moments import measure
from cat_plugin.ptq.observers import search_weight_range
from cat_plugin.ptq.report import LayerReport
from cat_plugin.ptq.spec import QuantSpec

__all__ = ["fit_layer"]

_ROWS = 1 << 16
_RIDGES = (0.01, 0.1, 1.0, 10.0)  # shares of the mean input variance


def _relative_error(node: Any, full: Executor, quantized: Executor, reference: Tensor) -> float:
    """Squared error of the layer as it stands over the reference's power, on the first batch."""
    y = quantized.value(node, slice(0, min(quantized.batch_size, quantized.count)))
    if node not in full.values:  # rows of the last axis, see Executor.gathered
        y = y.reshape(-1, y.shape[-1])
    some = reference[: len(y)].to(y.device)
    power = float(some.square().mean())
    error = float(F.mse_loss(y, some))
    return error / power if power > 0 else error


def fit_layer(
    node: Any,
    layer: QuantOp,
    full: Executor,
    quantized: Executor,
    spec: QuantSpec,
    generator: torch.Generator,
) -> LayerReport:
    """Choose grid, integers and bias of a layer, in place, and compute its outputs.

    Parameters
    ----------
    node : fx.Node
        The layer's node.
    layer : QuantOp
        Not quantized yet.
    full, quantized : Executor
        Values before the node, in full precision and quantized; the full-precision output is there already.
    spec : QuantSpec
        Which methods to use.
    generator : torch.Generator
        Draws output positions.

    Returns
    -------
    LayerReport
        With the relative output error of rounding to nearest and of what was chosen, on the first batch.
    """
    reference = full.gathered(node)
    symmetric = spec.symmetric_weights or layer.w_bits == 8
    layer.scale, layer.zero_point = search_weight_range(layer.weight, layer.w_bits, symmetric)
    layer.q_weight = layer.round_to_nearest()
    before = _relative_error(node, full, quantized, reference)
    if spec.compensation or spec.bias_correction:
        source = quantized.gathered(node.args[0])
        moments = measure(layer, source, reference, _ROWS, spec.batch_size, generator)
        if spec.compensation:
            grouped = layer.weight.reshape(layer.groups, -1, layer.weight[0].numel())
            target = grouped.double()
            if spec.refit:
                target = least_squares_weight(grouped, moments, ridge_by_halves(grouped, moments, _RIDGES))
            scale, zero_point = search_weight_range(target.flatten(0, 1), layer.w_bits, symmetric)
            shape = grouped.shape[:2]
            # from 6 bits on the searched scale is as good as any, and few integers move
            effort: dict[str, Any] = {} if layer.w_bits < 6 else {"factors": (1.0,), "sweeps": 2}
            integers, scale = fit_integers(
                target, moments, scale.reshape(shape), zero_point.reshape(shape), layer.qrange, **effort
            )
            layer.weight = target.reshape(layer.weight.shape).to(layer.weight.dtype)
            layer.q_weight = integers.reshape(layer.weight.shape)
            layer.scale, layer.zero_point = scale.reshape(-1), zero_point
        if spec.bias_correction:
            layer.bias = corrected_bias(layer, moments)
    quantized.run(node)
    after = _relative_error(node, full, quantized, reference)
    return LayerReport(
        layer.name, layer.kind, layer.w_bits, layer.a_bits, tuple(layer.weight.shape), before, after
    )
