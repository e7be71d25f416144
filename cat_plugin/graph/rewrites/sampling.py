"""Values read between pixels, as ``grid_sample`` does."""

from __future__ import annotations

import itertools
from typing import Any

import torch

__all__ = ["grid_sample"]

_NEAREST, _BICUBIC = 1, 2
_BORDER, _REFLECTION = 1, 2


def _reflected(place: Any, size: int, corners: bool) -> Any:
    """Back inside, from the centres of the outermost pixels or from their edges."""
    low, span = (0.0, size - 1.0) if corners else (-0.5, float(size))
    if span <= 0:
        return torch.zeros_like(place)
    beyond = torch.abs(place - low)
    turns = torch.floor(beyond / span)
    rest = beyond - turns * span
    odd = turns - 2 * torch.floor(turns / 2)
    return torch.where(odd > 0, span - rest, rest) + low


def grid_sample(x: Any, grid: Any, interpolation_mode: int, padding_mode: int, align_corners: bool) -> Any:
    """Bilinear or nearest values of (N, C, H, W) at (N, h, w, 2) places from -1 to 1, by ``gather`` on flat pixels."""
    if interpolation_mode == _BICUBIC:
        return NotImplemented
    sizes = [x.shape[3], x.shape[2]]
    flat = x.reshape([x.shape[0], x.shape[1], sizes[0] * sizes[1]])
    places = []
    for i, size in enumerate(sizes):
        unit = grid[..., i]
        place = (unit + 1) / 2 * (size - 1) if align_corners else ((unit + 1) * size - 1) / 2
        if padding_mode == _REFLECTION:
            place = _reflected(place, size, align_corners)
        places.append(place.clamp(0, size - 1) if padding_mode in (_BORDER, _REFLECTION) else place)
    if interpolation_mode == _NEAREST:
        return _read(flat, [torch.round(place) for place in places], sizes, None)
    low = [torch.floor(place) for place in places]
    total: Any = 0
    for steps in itertools.product((0, 1), repeat=2):
        weight: Any = 1
        for step, place, start in zip(steps, places, low, strict=True):
            part = place - start
            weight = weight * (part if step else 1 - part)
        total = total + _read(
            flat, [start + step for start, step in zip(low, steps, strict=True)], sizes, weight
        )
    return total


def _read(flat: Any, places: list[Any], sizes: list[int], weight: Any) -> Any:
    """(N, C, h, w) values of whole pixels, nothing outside, times (N, h, w) weights."""
    inside: Any = None
    columns, rows = (place.clamp(0, size - 1) for place, size in zip(places, sizes, strict=True))
    for place, size in zip(places, sizes, strict=True):
        here = torch.logical_and(place >= 0, place <= size - 1)
        inside = here if inside is None else torch.logical_and(inside, here)
    index = (rows.to(torch.int64) * sizes[0] + columns.to(torch.int64)).reshape(
        [flat.shape[0], 1, rows.shape[1] * rows.shape[2]]
    )
    read = torch.gather(flat, 2, index.expand([flat.shape[0], flat.shape[1], index.shape[2]]))
    kept = inside.to(flat.dtype) if weight is None else weight * inside.to(flat.dtype)
    return read.reshape([flat.shape[0], flat.shape[1], rows.shape[1], rows.shape[2]]) * kept.unsqueeze(1)
