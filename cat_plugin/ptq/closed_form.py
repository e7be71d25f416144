"""One pass over the graph without gradient steps: ranges, integers and biases, layer by layer in order.

Each layer sees the inputs that the already quantized layers before it produce, and is fitted to the
full-precision output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from cat_plugin.ptq.compensation import fit_integers, least_squares_weight
from cat_plugin.ptq.executor import Executor
from cat_plugin.ptq.insert import Prepared
from cat_plugin.ptq.modules import QuantOp
from cat_plugin.ptq.moments import measure
from cat_plugin.ptq.observers import search_activation_range, search_weight_range, subsample
from cat_plugin.ptq.quantizers import ActQuantizer
from cat_plugin.ptq.report import LayerReport
from cat_plugin.ptq.spec import QuantSpec

__all__ = ["calibrate"]

_SAMPLE = 1 << 17
_ROWS = 1 << 16
_RIDGE = 0.01


def _relative_error(y: Tensor, reference: Tensor) -> float:
    power = float(reference.square().mean())
    error = float(F.mse_loss(y, reference))
    return error / power if power > 0 else error


def calibrate(
    prepared: Prepared,
    inputs: Tensor,
    spec: QuantSpec,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[LayerReport]:
    """Choose every range and every integer in one pass, in place.

    Parameters
    ----------
    prepared : Prepared
        Graph with quantizers that have no range yet.
    inputs : Tensor
        (N, ...) calibration inputs.
    spec : QuantSpec
        What was asked for.
    progress : callable or None
        Called with (layer name, layers done, layers in all).

    Returns
    -------
    list of LayerReport
        In the order of execution.
    """
    module = prepared.module
    generator = torch.Generator().manual_seed(spec.seed)
    full = Executor(module, inputs, spec.batch_size)
    quantized = Executor(module, inputs, spec.batch_size)
    reports: list[LayerReport] = []
    last_use = _last_uses(module.graph)
    for node in module.graph.nodes:
        child = module.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(child, ActQuantizer):
            source = node.args[0]
            values = quantized.values[source]
            sample = subsample(values, _SAMPLE, generator)
            child.set_range(*search_activation_range(sample, child.bits, spec.symmetric_activations))
            full.values[node] = full.values[source]
            quantized.run(node)
        elif isinstance(child, QuantOp):
            reports.append(_fit_layer(node, child, full, quantized, spec, generator))
            if progress is not None:
                progress(child.name, len(reports), len(prepared.layers))
        else:
            full.run(node)
            quantized.run(node)
        for executor in (full, quantized):
            executor.drop(last_use.get(node, []))
    return reports


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Node -> nodes whose value nobody needs after it."""
    final: dict[fx.Node, fx.Node] = {}
    needed: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        direct: set[fx.Node] = set(node.all_input_nodes)
        value = node.meta.get("val")
        # a node whose value is not kept is recomputed at its users, so what it reads must live as long
        for source in list(direct):
            direct |= needed.get(source, set())
        kept = isinstance(value, Tensor) and value.ndim > 0 and not isinstance(value.shape[0], int)
        needed[node] = set() if kept and node.op != "get_attr" and "*" not in str(value.shape[0]) else direct
        for source in direct:
            final[source] = node
    out: dict[fx.Node, list[fx.Node]] = {}
    for source, node in final.items():
        out.setdefault(node, []).append(source)
    return out


def _fit_layer(
    node: Any,
    layer: QuantOp,
    full: Executor,
    quantized: Executor,
    spec: QuantSpec,
    generator: torch.Generator,
) -> LayerReport:
    def in_float(n: fx.Node, rows: slice) -> Any:
        return layer.compute(full.value(n.args[0], rows), layer.weight, layer.bias)

    full.run(node, in_float)
    reference = full.values[node]
    symmetric = spec.symmetric_weights or layer.w_bits == 8
    layer.scale, layer.zero_point = search_weight_range(layer.weight, layer.w_bits, symmetric)
    layer.q_weight = layer.round_to_nearest()
    quantized.run(node)
    before = _relative_error(quantized.values[node], reference)
    source = quantized.values[node.args[0]]
    moments = measure(layer, source, reference, _ROWS, spec.batch_size, generator)
    grouped = layer.weight.reshape(layer.groups, -1, layer.weight[0].numel())
    target = least_squares_weight(grouped, moments, _RIDGE)
    scale, zero_point = search_weight_range(target.flatten(0, 1), layer.w_bits, symmetric)
    shape = grouped.shape[:2]
    integers, scale = fit_integers(target, moments, scale.reshape(shape), zero_point.reshape(shape), layer.qrange)
    layer.q_weight = integers.reshape(layer.weight.shape)
    layer.scale, layer.zero_point = scale.reshape(-1), zero_point
    fitted = layer.dequantized().reshape(grouped.shape).double()
    bias = moments.mean_y - torch.einsum("grk,gk->gr", fitted, moments.mean_x)
    layer.bias = bias.reshape(-1).to(layer.weight.dtype)
    quantized.run(node)
    return LayerReport(
        layer.name,
        layer.kind,
        layer.w_bits,
        layer.a_bits,
        tuple(layer.weight.shape),
        before,
        _relative_error(quantized.values[node], reference),
    )
