"""8-bit weights that processors without VNNI can multiply as bytes: two neighbours of one sign add up to 128 at most.

``vpmaddubsw`` multiplies unsigned bytes by signed ones and adds two products up in 16 bits, where ``255 * 128`` still fits and
``255 * 129`` does not.  Trained weights rounded to 8 bits break that in two to three per cent of their pairs, and a single one makes a
layer's kernel multiply 16-bit words instead, half as many at a time.  Here the rounding never builds such a pair.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LIMIT", "bounded", "partners"]

LIMIT = 128
"""What the magnitudes of two neighbours of one sign add up to at most."""


def partners(shape: tuple[int, ...], groups: int, dilation: int) -> Tensor:
    """The neighbour of each input of a channel.

    Neighbours are multiplied side by side: two input channels at one place, numbers 0 and 1, 2 and 3, and so on.  A
    convolution without groups and dilation reads a row of its kernel as one stretch, so with an odd number of channels neighbours
    also lie across two places.

    Parameters
    ----------
    shape : tuple of int
        Of the weight, (O, I, ...) with at most two axes of a kernel.
    groups : int
        Of the convolution.
    dilation : int
        Along the last axis.

    Returns
    -------
    Tensor
        (K,) int64 indices into the flattened ``shape[1:]``; the own one where there is no neighbour.
    """
    channels, *kernel = shape[1:]
    height, width = (1, 1, *kernel)[-2:]
    where = torch.arange(channels * height * width).reshape(channels, height, width).permute(1, 2, 0)
    joined = groups == 1 and dilation == 1
    stretches = where.reshape((height, -1) if joined else (height * width, -1))
    length = stretches.shape[1]
    neighbour = torch.arange(length) ^ 1
    neighbour[neighbour >= length] = length - 1
    result = torch.empty(where.numel(), dtype=torch.int64)
    result[stretches.flatten()] = stretches[:, neighbour].flatten()
    return result


def bounded(values: Tensor, neighbours: Tensor) -> Tensor:
    """Weights moved towards zero, both of a pair by equally much, until no pair exceeds the limit.

    Parameters
    ----------
    values : Tensor
        (..., K) weights in steps of their grid; integers stay integers.
    neighbours : Tensor
        (K,) from :func:`partners`.

    Returns
    -------
    Tensor
        The same shape and dtype.
    """
    own = torch.arange(len(neighbours), device=neighbours.device)
    other = values[..., neighbours]
    one_sign = (values * other > 0) & (own != neighbours)
    excess = torch.where(one_sign, values.abs() + other.abs() - LIMIT, 0.0).clamp(min=0)
    half = excess / 2
    if bool((values == values.round()).all()):
        half = torch.where(own < neighbours, half.ceil(), half.floor())
    return values - values.sign() * half
