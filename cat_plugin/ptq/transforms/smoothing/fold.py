"""Scales and shifts folded into the weights and biases on both sides of a place, so that they cost nothing at run time."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from cat_plugin.ptq.graph.constants import own_constant
from cat_plugin.ptq.graph.ops import constant, is_call
from cat_plugin.ptq.transforms.smoothing.places import Place, Side, bias_argument

__all__ = ["fold_place"]

_aten = torch.ops.aten
_RMS_NORM = _aten.rms_norm.default


def fold_place(module: fx.GraphModule, place: Place, scales: Tensor, shifts: Tensor | None = None) -> None:
    """Apply scales and shifts, in place; the function of the graph stays as it is.

    Parameters
    ----------
    module : fx.GraphModule
        BatchNorm-folded ATen graph.
    place : Place
        Of this graph.
    scales : Tensor
        (n,) positive, one for each of the place's scales.
    shifts : Tensor or None
        (n,), if the place may be shifted.
    """
    scales = scales.double()
    if shifts is not None:
        shifts = shifts.double()
    for side in place.readers:
        weight = own_constant(module, side.node, 1)
        columns = side.channels.to(weight.device)
        factors, moves = _of(side, scales, weight.device), None
        if shifts is not None:
            moves = weight[:, columns].double() @ shifts[side.scales].to(weight.device)
        weight[:, columns] = (weight[:, columns].double() * factors).to(weight.dtype)
        if moves is not None:
            bias = own_constant(module, side.node, 2)
            bias.copy_(bias.double() + moves)
    for side in place.sources:
        weight = own_constant(module, side.node, _weight_argument(module, side.node))
        rows = side.channels.to(weight.device)
        factors = _of(side, scales, weight.device)
        shape = [-1] + [1] * (weight.ndim - 1)
        weight[rows] = (weight[rows].double() / factors.reshape(shape)).to(weight.dtype)
        index = bias_argument(side.node)
        if index is None or len(side.node.args) <= index or constant(module, side.node.args[index]) is None:
            continue
        bias = own_constant(module, side.node, index)
        values = bias[rows].double()
        if shifts is not None:
            values = values - shifts[side.scales].to(bias.device)
        bias[rows] = (values / factors).to(bias.dtype)


def _of(side: Side, scales: Tensor, device: torch.device) -> Tensor:
    """(n,) what each of the side's channels is divided, or each reader's column multiplied, by."""
    return (scales[side.scales] ** side.exponents).to(device)


def _weight_argument(module: fx.GraphModule, node: fx.Node) -> int:
    """Position of the factor for each channel among a maker's arguments."""
    if is_call(node, {_aten.linear.default}):
        return 1
    if is_call(node, {_aten.layer_norm.default, _RMS_NORM, _aten.addcmul.default}):
        return 2
    return next(i for i, arg in enumerate(node.args) if constant(module, arg) is not None)
