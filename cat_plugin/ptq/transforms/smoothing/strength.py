"""How far the ranges of a place's channels are brought together: as far as the layers behind it gain by it.

Channels of one range make the best of an activation's grid, and leave columns of very different size to the weights' grids; the
power of the range by which each channel is divided decides between the two.  It is chosen by the output error of the readers
on some rows, the activation rounded and the weights rounded (as AWQ does for weights alone, Lin et al., arXiv 2306.00978,
section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx

from cat_plugin.ptq.graph.insert import group_of
from cat_plugin.ptq.graph.ops import weight_of
from cat_plugin.ptq.quantizers.observers import search_activation_range, subsample
from cat_plugin.ptq.quantizers.uniform import integer_range
from cat_plugin.ptq.transforms.smoothing.places import Place

__all__ = ["best_strength", "output_errors", "powered"]

_STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_SAMPLE = 1 << 14  # values that a trial's activation range is searched on
_COMPENSATED = 0.5  # of the error of weights rounded to nearest, what compensation leaves of it


def best_strength(
    module: fx.GraphModule,
    place: Place,
    samples: Sequence[Tensor],
    reach: Tensor,
    shifts: Tensor | None,
    bits: tuple[int, int | None],
    groups: int | None = None,
    turns: Mapping[fx.Node, Callable[[Tensor], Tensor]] | None = None,
) -> tuple[float, float]:
    """Power of the channels' ranges, 0..1, that loses least, and what it loses.

    Parameters
    ----------
    module : fx.GraphModule
        BatchNorm-folded ATen graph.
    place : Place
        With readers.
    samples : sequence of Tensor
        (rows, C) of what each reader reads, in their order.
    reach : Tensor
        (n,) half the range of each of the place's channels.
    shifts : Tensor or None
        (n,) what is subtracted before.
    bits : tuple of int
        Of weights and activations; None leaves these in float.
    groups : int or None
        Input features of a row that share a scale.
    turns : mapping or None
        What will yet be done to the (n, C) rows that a layer reads and to those of its weight, for layers with rotated inputs.

    Returns
    -------
    strength, loss : float
        The loss is a squared error of the readers' outputs: comparable at one place.
    """
    losses = []
    for strength in _STRENGTHS:
        scales = powered(reach, strength)
        activation, weight = output_errors(module, place, samples, scales, shifts, bits, groups, turns)
        losses.append(activation + _COMPENSATED * weight)
    best = min(range(len(losses)), key=losses.__getitem__)
    return _STRENGTHS[best], losses[best]


def powered(reach: Tensor, strength: float) -> Tensor:
    """(n,) ranges to a power, with the geometric mean 1."""
    logarithm = reach.clamp(min=1e-6).log()
    return ((logarithm - logarithm.mean()) * strength).exp()


def output_errors(
    module: fx.GraphModule,
    place: Place,
    samples: Sequence[Tensor],
    scales: Tensor,
    shifts: Tensor | None,
    bits: tuple[int, int | None],
    groups: int | None = None,
    turns: Mapping[fx.Node, Callable[[Tensor], Tensor]] | None = None,
) -> tuple[float, float]:
    """Mean squared error of the readers' outputs with the activation rounded, and with the weights rounded."""
    w_bits, a_bits = bits
    activation = weights = 0.0
    for side, sample in zip(place.readers, samples, strict=True):
        x, weight = sample.float(), weight_of(module, side.node).float()
        factor, shift = torch.ones_like(x[0]), torch.zeros_like(x[0])
        columns, index = side.channels.to(x.device), side.scales
        factor[columns] = (scales[index] ** side.exponents).to(x)
        if shifts is not None:
            shift[columns] = shifts[index].to(x)
        x, weight = (x - shift) / factor, weight * factor
        if turns is not None and side.node in turns:
            x, weight = turns[side.node](x), turns[side.node](weight)
        if a_bits is not None:
            activation += _variance((_rounded(x, a_bits) - x) @ weight.T)
        rows = weight.reshape(-1, group_of(weight.shape[1], groups) or weight.shape[1])
        weights += _variance(x @ (_nearest(rows, w_bits).reshape(weight.shape) - weight).T)
    return activation, weights


def _rounded(x: Tensor, bits: int) -> Tensor:
    """``x`` on the grid of least error."""
    few = subsample(x, _SAMPLE, torch.Generator().manual_seed(0))
    scale, zero, signed = search_activation_range(few, bits, False)
    integers = (torch.round(x / scale) + zero).clamp_(*integer_range(bits, signed))
    return integers.sub_(zero).mul_(scale)


def _variance(error: Tensor) -> float:
    """Mean square of an error but for its mean, which goes into the bias."""
    return float((error - error.mean(0)).square().mean())


def _nearest(weight: Tensor, bits: int) -> Tensor:
    """(O, I) weight rounded to nearest on a grid for each row, the best of some ranges."""
    steps = 2**bits - 1
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    best, least = weight, torch.full_like(low, torch.inf)
    for share in (1.0, 0.85, 0.7, 0.55):
        scale = (share * (high - low) / steps).clamp(min=1e-8)
        zero = torch.round(-share * low / scale)
        rounded = ((torch.round(weight / scale) + zero).clamp_(0, steps) - zero) * scale
        error = (rounded - weight).square().sum(1, keepdim=True)
        best = torch.where(error < least, rounded, best)
        least = torch.minimum(error, least)
    return best
