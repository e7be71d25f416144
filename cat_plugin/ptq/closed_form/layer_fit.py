"""One layer in closed form: range, integers and bias from the moments of its inputs and target outputs.

What a layer should give is its full-precision output, and where that is added to a shortcut, also what the shortcut has
lost on its way: the target is then the full-precision sum less the quantized shortcut, so that errors do not add up
along a chain of residual blocks as far as the layer's inputs tell of them.  (In AdaRound and BRECQ, arXiv 2004.10568 and
2102.05426, the unit's quantized input plays that part for its layers; the shortcut is the input that no layer reads.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from cat_plugin.ptq.closed_form.bias_correction import corrected_bias, shift_behind_clip
from cat_plugin.ptq.closed_form.compensation import fit_integers, least_squares_weight, ridge_by_halves
from cat_plugin.ptq.closed_form.grid_products import Grid
from cat_plugin.ptq.closed_form.moments import PATCHES, ROWS, measure, pass_over
from cat_plugin.ptq.fitted import PARTS
from cat_plugin.ptq.graph.executor import Executor, first_inputs, rows_of
from cat_plugin.ptq.graph.modules import QuantOp
from cat_plugin.ptq.graph.ops import arguments, is_batch_size, is_batched, is_call, is_relu6, operand
from cat_plugin.ptq.quantizers.observers import search_weight_range
from cat_plugin.ptq.quantizers.uniform import ActQuantizer
from cat_plugin.ptq.ranks import ALONE, Ranks
from cat_plugin.ptq.report import LayerReport
from cat_plugin.ptq.spec import QuantSpec
from cat_plugin.ptq.transforms.equalization import Ceiling

__all__ = ["fit_layer"]

# Weights of a linear layer, as language models have them, from which on fewer passes are made: of the error that eight passes
# from every starting scale leave, four with the best after one leave 1.00 to 1.01.
_LARGE = 1 << 18
# From here on, which is what output layers of language models have, weights of 6 bits and more are rounded to nearest: as good, and
# a least-squares weight for each word takes longer than all other layers.
_VOCABULARY = 1 << 24
# Shares of the mean input variance; the last leaves the weight as it was trained.
_RIDGES = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
# A layer whose refit does not carry over to other inputs with less ridge than this has too few samples for its
# covariance as well: that is damped by as much as its mean variance, and the bias is chosen for what shows behind ReLU.
_SCARCE = 10.0
# Steps tried where neighbours are bounded, by how many they are: a coarser grid leaves fewer of them at their bound, one of
# so many times the step none
_COARSER = {2: (1.0, 1.15, 1.35, 1.6, 2.0), 4: (1.0, 1.15, 1.35, 1.6, 2.0, 4.0)}


def _known(node: fx.Node, values: Executor) -> bool:
    """Whether a node's value can be had without running what has not been fitted yet."""
    if node in values.values or node.op == "get_attr" or is_batch_size(node):
        return True
    return node.op == "call_function" and all(_known(n, values) for n in node.all_input_nodes)


def _shortcut(node: fx.Node, full: Executor, quantized: Executor) -> fx.Node | None:
    """What is added to the layer's output, by an addition that alone reads it; None if there is none, or not yet."""
    while len(node.users) == 1:
        (user,) = node.users
        if is_call(user, {torch.ops.aten.add.Tensor}):
            others = [n for n in arguments(user) if n is not node]
            if len(others) != 1 or len(user.args) != 2 or user.kwargs or not is_batched(node):
                return None
            other = others[0]
            if not isinstance(other, fx.Node):  # a number
                return None
            same = is_batched(other) and other.meta["val"].shape[1:] == node.meta["val"].shape[1:]
            return other if same and _known(other, full) and _known(other, quantized) else None
        if user.op != "call_module" or not isinstance(
            quantized.module.get_submodule(str(user.target)), ActQuantizer
        ):
            return None
        node = user
    return None


def _target(node: fx.Node, full: Executor, quantized: Executor) -> Callable[[slice], Tensor]:
    """What the layer should give, for some rows (N, ...) of those that its input is gathered in."""
    if not is_batched(node):
        gathered = full.gathered(node)
        return lambda rows: gathered[rows].to(full.device)
    other = _shortcut(node, full, quantized) if node in full.values else None
    if other is None:
        return lambda rows: full.value(node, rows)
    return lambda rows: full.value(node, rows) + (full.value(other, rows) - quantized.value(other, rows))


def _grid(node: fx.Node, quantized: Executor) -> Grid | None:
    """The grid of a quantizer's values."""
    return Grid.of(quantized.module.get_submodule(str(node.target))) if node.op == "call_module" else None


def _clip(node: fx.Node, module: fx.GraphModule) -> tuple[float, float] | None:
    """Ends of the ReLU or ReLU6 that alone reads a node; None if there is none."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    if is_call(user, {torch.ops.aten.relu.default}):
        return 0.0, math.inf
    ceiling = user.op == "call_module" and isinstance(module.get_submodule(str(user.target)), Ceiling)
    return (0.0, 6.0) if ceiling or is_relu6(user) else None


def _at(values: Tensor, axis: int, positions: Tensor) -> Tensor:
    """(C, n * positions) of values (n, ...) with their channels along an axis, at some of the other axes' positions."""
    if values.ndim == 2:
        return values.T
    if axis == 1:
        return values.flatten(2).index_select(2, positions).movedim(1, 0).flatten(1)
    return values.flatten(1, -2).index_select(1, positions).flatten(0, 1).T


def _shift_bias(
    node: fx.Node,
    layer: QuantOp,
    quantized: Executor,
    target: Callable[[slice], Tensor],
    generator: torch.Generator,
    fitted: int,
    ranks: Ranks,
) -> None:
    """Bring the bias, and the outputs that are there already, nearer to what shows behind a clip."""
    ends, outputs = _clip(node, quantized.module), quantized.values.get(node)
    if ends is None or outputs is None or layer.bias is None:
        return
    axis = outputs.ndim - 1 if layer.kind == "linear" else 1
    width = outputs.shape[axis]
    count = outputs[0].numel() // width
    extent = ranks.extent(fitted)
    before, behind = (len(sizes) for sizes in extent.others(quantized.batch_size))

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        pass_over(generator, count, before)
        for start in range(0, fitted, quantized.batch_size):
            positions = torch.randperm(count, generator=generator)[: max(1, ROWS // extent.total)]
            end, step = min(start + quantized.batch_size, fitted), max(1, PATCHES // (width * len(positions)))
            for first in range(start, end, step):
                rows = slice(first, min(first + step, end))
                given, wanted = outputs[rows].to(quantized.device), target(rows)
                places = positions.to(given.device)
                yield _at(given, axis, places), _at(wanted, axis, places)
                quantized.store.settle()
        pass_over(generator, count, behind)

    shift = ranks.same(shift_behind_clip(parts(), *ends, ranks))
    layer.bias = layer.bias + shift.to(layer.bias.device)
    # to add the shift to what is there would give other last bits than a run that is resumed
    quantized.run(node)


def _relative_error(node: fx.Node, quantized: Executor, target: Callable[[slice], Tensor]) -> float:
    """Squared error of the layer as it stands over the target's power, on the first batch."""
    count, power, error = min(quantized.batch_size, quantized.count), 0.0, 0.0
    pieces = quantized.pieces(node, count) if is_batched(node) else [slice(0, count)]
    for rows in pieces:
        y = rows_of(node, quantized.value(node, rows))
        if not is_batched(node):
            rows = slice(0, len(y))
        some = target(rows).to(y.device)
        share = 1.0 / len(pieces) if not is_batched(node) else len(y) / count
        power += float(some.square().mean()) * share
        error += float(F.mse_loss(y, some)) * share
    return error / power if power > 0 else error


def _coarsen(layer: QuantOp, factors: tuple[float, ...]) -> None:
    """Take the multiple of each channel's step with which rounding to nearest, neighbours within their bound, errs least."""
    start, best = layer.scale, layer.scale
    least = torch.full_like(start, torch.inf)
    for factor in factors:
        layer.scale = start * factor
        layer.q_weight = layer.round_to_nearest()
        error = (layer.dequantized() - layer.weight).square().reshape(*start.shape, -1).sum(-1)
        best = torch.where(error < least, layer.scale, best)
        least = torch.minimum(error, least)
    layer.scale = best


def fit_layer(
    node: fx.Node,
    layer: QuantOp,
    full: Executor,
    quantized: Executor,
    spec: QuantSpec,
    generator: torch.Generator,
    fitted: int,
    weights: Tensor | None = None,
    *,
    kept: bool = True,
    ranks: Ranks = ALONE,
) -> LayerReport:
    """Choose grid, integers and bias of a layer, in place, and compute its outputs.

    Parameters
    ----------
    node : fx.Node
        The layer's node.
    layer : QuantOp
        Not quantized yet.
    full, quantized : Executor
        Values before the node, in full precision and quantized; if outputs are kept, that of full precision is there already.
    spec : QuantSpec
        Which methods to use.
    generator : torch.Generator
        Draws output positions.
    fitted : int
        Calibration inputs, the first ones, that the layer is fitted to.
    weights : Tensor or None
        (N, positions) how much each position of a linear layer's output counts.
    kept : bool
        Whether its outputs are computed for all inputs and kept.
    ranks : Ranks
        The processes to all of whose inputs it is fitted.

    Returns
    -------
    LayerReport
        With the relative output error of rounding to nearest and of what was chosen, on the first batch; of the sum
        where the output is added to a shortcut.
    """
    target = _target(node, full, quantized)
    symmetric = spec.symmetric_weights or layer.w_bits == 8
    factor = layer.modulation
    plain_weight = layer.weight if factor is None else layer.weight / factor
    layer.scale, layer.zero_point = search_weight_range(plain_weight, layer.w_bits, symmetric, layer.group)
    neighbours = layer.neighbours
    coarser = () if neighbours is None else _COARSER[1 + neighbours.shape[1]]
    if coarser:
        _coarsen(layer, coarser)
    layer.q_weight = layer.round_to_nearest()
    before = _relative_error(node, quantized, target)
    scarce = False
    plain = layer.w_bits >= 6 and layer.weight.numel() > _VOCABULARY
    if (spec.compensation or spec.bias_correction) and not plain:
        source = operand(node)
        x = first_inputs(quantized.gathered(source), fitted, quantized.count)
        some = None if weights is None else weights[:fitted]
        moments = measure(
            layer, x, target, ROWS, spec.batch_size, generator, some, ranks, _grid(source, quantized)
        )
        quantized.store.trim()
        if spec.compensation:
            grouped = layer.weight.reshape(layer.groups, -1, layer.weight[0].numel())
            weight = grouped.double()
            if spec.refit:
                ridge = ridge_by_halves(grouped, moments, _RIDGES)
                weight = least_squares_weight(grouped, moments, ridge)
                scarce = bool(moments.halves) and ridge >= _SCARCE  # a single batch has nothing to judge on
            rows = weight.flatten(0, 1) if factor is None else weight.flatten(0, 1) / factor
            grid = search_weight_range(rows, layer.w_bits, symmetric, layer.group)
            scale, zero_point = (values.reshape(*grouped.shape[:2], -1) for values in grid)
            # from 6 bits on the searched scale is as good as any, and few integers move
            effort: dict[str, Any] = {} if layer.w_bits < 6 else {"factors": (1.0,), "sweeps": 2}
            if layer.w_bits < 6 and layer.kind == "linear" and layer.weight.numel() > _LARGE:
                effort = {"sweeps": 4, "trial": 1}
            if scarce:
                effort["damping"] = 1.0
            if neighbours is not None:
                effort |= {"factors": coarser, "sweeps": 4, "neighbours": neighbours}
            if factor is not None:
                effort["modulation"] = factor.reshape(weight.shape)
            integers, scale = fit_integers(weight, moments, scale, zero_point, layer.qrange, **effort)
            layer.weight = weight.reshape(layer.weight.shape).to(layer.weight.dtype)
            layer.q_weight = integers.reshape(layer.weight.shape)
            layer.scale, layer.zero_point = (v.reshape(layer.scale.shape) for v in (scale, zero_point))
        if spec.bias_correction:
            layer.bias = corrected_bias(layer, moments)
    for part in (*PARTS, "bias"):
        value = getattr(layer, part)
        setattr(layer, part, None if value is None else ranks.same(value))
    scarce = bool(ranks.same(torch.tensor(int(scarce))))
    if kept:
        quantized.run(node)
    if scarce and spec.bias_correction:
        _shift_bias(node, layer, quantized, target, generator, fitted, ranks)
    after = _relative_error(node, quantized, target)
    return LayerReport(
        layer.name, layer.kind, layer.w_bits, layer.a_bits, tuple(layer.weight.shape), before, after
    )
