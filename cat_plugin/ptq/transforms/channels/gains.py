"""Factors of channels, chosen by a model of what rounding them, and the weights that read them, makes of errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["COMPENSATED", "gains_of"]

_FRACTIONS = tuple(0.05 * i for i in range(4, 21))  # of a channel's greatest value, tried as its range
_COARSE = (0.3, 0.45, 0.6, 0.8, 1.0)  # the same of the whole tensor's, where gains are compared
_NOISE_SAMPLES = 128  # of each channel, for that
_EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
# shares of the channels that gains leave within their reach; those of the others are clipped to it
_WITHIN_REACH = (0.9, 1.0)
_MOST = 8.0  # no channel is scaled by more
# What the modelled noise in front of a dense layer has to fall to: less was worth nothing measured (docs/benchmarks/ptq_history.md)
_WORTH = 0.5
#: What is left of the weights' rounding noise once its errors compensate each other: the order measured on 1x1 layers.
COMPENSATED = 0.3


def _rounding_error(values: Tensor, clip: Tensor, levels: int) -> Tensor:
    """(C,) mean squared error of rounding (C, n) magnitudes to ``levels`` steps up to ``clip``, (C, 1) or ()."""
    step = clip.clamp(min=1e-12) / levels
    return ((values / step).round_().clamp_(max=levels).mul_(step) - values).square_().mean(1)


def _ranges(values: Tensor, levels: int) -> Tensor:
    """(C,) clipping range of least squared error of each channel's (C, n) magnitudes."""
    high = values.amax(1, keepdim=True)
    errors = torch.stack([_rounding_error(values, f * high, levels) for f in _FRACTIONS])
    return high.squeeze(1) * torch.tensor(_FRACTIONS, device=values.device)[errors.argmin(0)]


def _candidates(full: Tensor, columns: Tensor, reach: Tensor | None) -> Iterator[Tensor]:
    """(C,) gains to choose from: powers of what evens the activation's ranges times powers of the columns' reach.

    ``reach`` is the most that a channel may be scaled by without being clipped earlier than it was, where there is a clip.
    """
    for a, b in itertools.product(_EXPONENTS, repeat=2):
        gains = full**a * columns**b
        if reach is None:
            yield gains
            continue
        for share in _WITHIN_REACH:
            yield torch.minimum(gains / (gains / reach).quantile(share), reach)


def _activation_noise(values: Tensor, gains: Tensor, levels: int, top: float, importance: Tensor) -> float:
    """Squared error at the second layer's outputs that rounding (C, n) scaled values, and clipping them, makes."""
    gains = gains.unsqueeze(1)
    scaled = (values * gains).clamp_(max=top)
    wanted = values.clamp(max=top)
    end = float(scaled.max())
    errors = []
    for fraction in _COARSE:
        step = max(fraction * end / levels, 1e-12)
        rounded = (scaled / step).round_().clamp_(max=levels).mul_(step).div_(gains)
        errors.append(float((rounded.sub_(wanted).square_().mean(1) * importance).sum()))
    return min(errors)


def _weight_noise(weight: Tensor, gains: Tensor, power: Tensor, w_bits: int) -> float:
    """The same for rounding the (O, C, k) weight, each row with one step for all of its columns."""
    step = (weight / gains.reshape(1, -1, 1)).abs().amax((1, 2)) / 2 ** (w_bits - 1)
    noise = float(step.square().sum() / 12 * (gains.square() * power).sum() * weight.shape[2])
    return COMPENSATED * noise


def gains_of(
    values: Tensor,
    power: Tensor,
    least: Tensor,
    levels: int,
    weight: Tensor | None,
    w_bits: int,
    top: float,
) -> Tensor:
    """(C,) factors of the channels; 1 or more before a depthwise layer.

    Parameters
    ----------
    values : Tensor
        (C, n) magnitudes of the tensor that is quantized, before it is clipped.
    power : Tensor
        (C,) its variance.
    least : Tensor
        (C,) what each channel's range covers at least.
    levels : int
        Steps from 0 to the end of its range.
    weight : Tensor or None
        (O, C, ...) of the dense layer that reads it; None for a depthwise one.
    w_bits : int
        Its bits.
    top : float
        Where the values are clipped, infinity if they are not.
    """
    ranges = torch.maximum(_ranges(values.clamp(max=top), levels), least)
    most = ranges.max()
    alive = ranges > most / _MOST**3
    full = torch.where(alive, most / ranges.clamp(min=1e-12), torch.ones_like(ranges)).clamp(max=_MOST)
    if weight is None:
        return full
    flat = weight.reshape(*weight.shape[:2], -1)
    columns = flat.abs().amax((0, 2))
    columns = (columns / columns.median().clamp(min=1e-12)).clamp(1 / _MOST, _MOST)
    reach = None if math.isinf(top) else top / ranges.clamp(min=1e-3 * top)
    importance = flat.square().sum((0, 2))
    values = values[:, :_NOISE_SAMPLES]

    def noise(gains: Tensor) -> float:
        activations = _activation_noise(values, gains, levels, top, importance)
        return activations + _weight_noise(flat, gains, power, w_bits)

    none = torch.ones_like(full)
    best = min(_candidates(full, columns, reach), key=noise)
    return best if noise(best) <= _WORTH * noise(none) else none
