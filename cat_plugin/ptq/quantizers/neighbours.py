"""8-bit weights that processors without VNNI can multiply as bytes: neighbours of one sign add up to 128 at most.

``vpmaddubsw`` multiplies unsigned bytes by signed ones and adds two products up in 16 bits, where ``255 * 128`` still fits and
``255 * 129`` does not.  Trained weights rounded to 8 bits break that in two to three per cent of their pairs, and a single one makes a
layer's kernel multiply 16-bit words instead, half as many at a time.  Where four neighbours keep to the same bound, the sums of
two such instructions are added in 16 bits, and every other widening to 32 is saved.  Here the rounding never builds
neighbours that exceed it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LIMIT", "TOGETHER", "bounded", "partners"]

LIMIT = 128
"""What the magnitudes of neighbours of one sign add up to at most."""

TOGETHER = {"pairs": 2, "fours": 4}
"""How many weights are added up in 16 bits, by the names of the option ``bounded_sums``."""

_STEP = 4  # bytes of a channel that one instruction takes: in each 32 bits of a vector two pairs


def partners(shape: tuple[int, ...], groups: int, dilation: int, together: int = 2) -> Tensor:
    """The neighbours of each input of a channel.

    Neighbours are multiplied side by side: two input channels at one place, numbers 0 and 1, 2 and 3, and so on; of fours
    also those that the next instruction multiplies in the same place, 4 and 5 with 0 and 1.  A convolution without
    groups and dilation reads a row of its kernel as one stretch, so with an odd number of channels neighbours also lie across
    two places.  Stretches of one instruction are added two and two.

    Parameters
    ----------
    shape : tuple of int
        Of the weight, (O, I, ...) with at most two axes of a kernel.
    groups : int
        Of the convolution.
    dilation : int
        Along the last axis.
    together : int
        2 or 4, of :data:`TOGETHER`.

    Returns
    -------
    Tensor
        (K, together - 1) int64 indices into the flattened ``shape[1:]``; the own one where there is no neighbour.
    """
    channels, *kernel = shape[1:]
    height, width = (1, 1, *kernel)[-2:]
    where = torch.arange(channels * height * width).reshape(channels, height, width).permute(1, 2, 0)
    joined = groups == 1 and dilation == 1
    stretches = where.reshape((height, -1) if joined else (height * width, -1))
    padded = torch.nn.functional.pad(stretches, (0, -stretches.shape[1] % _STEP), value=-1)
    if padded.shape[1] == _STEP:
        padded = padded.reshape(1, -1)
    padded = torch.nn.functional.pad(padded, (0, padded.shape[1] % (2 * _STEP)), value=-1)
    sums = padded.reshape(-1, 2, 2, 2).transpose(1, 2) if together == 4 else padded  # by step, half, place
    members = sums.reshape(-1, together)
    result = torch.empty(where.numel(), together - 1, dtype=torch.int64)
    for place in range(together):
        own, others = members[:, place], members[:, [p for p in range(together) if p != place]]
        there = own >= 0
        found = torch.where(others < 0, own.unsqueeze(1), others)
        result[own[there]] = found[there]
    return result


def bounded(values: Tensor, neighbours: Tensor) -> Tensor:
    """Weights moved towards zero, those of one sign by equally much, until no neighbours exceed the limit.

    Parameters
    ----------
    values : Tensor
        (..., K) weights in steps of their grid; integers stay integers.
    neighbours : Tensor
        (K, ...) from :func:`partners`.

    Returns
    -------
    Tensor
        The same shape and dtype; of real weights the nearest ones that keep to the limit.
    """
    own = torch.arange(len(neighbours), device=neighbours.device)
    members = torch.cat([own.unsqueeze(1), neighbours], 1)
    members = members[members.amin(1) == own]
    there = torch.ones_like(members, dtype=torch.bool)
    there[:, 1:] = members[:, 1:] != members[:, :1]
    whole = bool((values == values.round()).all())
    sums = torch.where(there, values[..., members], 0)
    for sign in (1, -1):
        sizes = (sign * sums).clamp(min=0)
        exceeding = sizes.sum(-1) > LIMIT
        lessened = sizes[exceeding]
        sums[exceeding] += sign * (_within(lessened, whole) - lessened).to(values.dtype)
    result = values.clone()
    result[..., members[there]] = sums[..., there]
    return result


def _within(sizes: Tensor, whole: bool) -> Tensor:
    """(n, m) sizes that add up to more than the limit, all of them lessened by the same amount or to zero."""
    largest, order = sizes.sort(-1, descending=True)
    count = torch.arange(1, sizes.shape[-1] + 1, device=sizes.device)
    amounts = (largest.cumsum(-1) - LIMIT) / count
    last = (largest > amounts).sum(-1, keepdim=True).clamp(min=1) - 1
    lessened = (largest - amounts.gather(-1, last)).clamp(min=0)
    if whole:  # what rounding down leaves of the limit goes to those that lost most by it
        down = lessened.floor()
        left = (lessened.sum(-1, keepdim=True) - down.sum(-1, keepdim=True)).round()
        rank = (down - lessened).argsort(dim=-1, stable=True).argsort(-1)
        lessened = down + (rank < left)
    return torch.empty_like(lessened).scatter_(-1, order, lessened)
