"""Resizing, exactly as torch does it: by the index of the nearest element, or by a matrix of weights along each dimension.

TVM's resize knows half-pixel and corner-aligned coordinates and cubic weights of another sharpness; torch's nearest resize
floors, a given ``scale_factor`` counts even where it is not the ratio of the sizes, and ``antialias`` widens the filter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cat_plugin.graph.rewrites.indexing import along

__all__ = ["rewrites"]

aten = torch.ops.aten


def _sizes(x: Any, output_size: Any, scale_factors: Any) -> tuple[list[int], list[float | None]]:
    """The sizes that result, and the scale factors that count."""
    spatial = x.shape[2:]
    if output_size is not None:
        return list(output_size), [None] * len(spatial)
    factors = [float(factor) for factor in scale_factors]
    return [math.floor(size * factor) for size, factor in zip(spatial, factors, strict=True)], list(factors)


def _ratio(size: int, out: int, factor: float | None, align_corners: bool = False) -> float:
    """Input elements for one output element."""
    if align_corners:
        return (size - 1) / (out - 1) if out > 1 else 0.0
    return 1.0 / factor if factor is not None and factor > 0 else size / out


def _positions(out: int, ratio: float, align_corners: bool, device: Any) -> Any:
    number = torch.arange(out, dtype=torch.float32, device=device)
    return number * ratio if align_corners else (number + 0.5) * ratio - 0.5


def _nearest(x: Any, sizes: Sequence[int], factors: Sequence[float | None], exact: bool) -> Any:
    for i, (out, factor) in enumerate(zip(sizes, factors, strict=True)):
        dim, size = i + 2, x.shape[i + 2]
        if out == size and factor in (None, 1.0):
            continue
        ratio = _ratio(size, out, factor)
        if out % size == 0 and ratio == size / out:  # each element several times
            repeats = out // size
            x = x.unsqueeze(dim + 1).expand([*x.shape[: dim + 1], repeats, *x.shape[dim + 1 :]])
            x = x.reshape([*x.shape[:dim], out, *x.shape[dim + 2 :]])
            continue
        number = torch.arange(out, dtype=torch.float32, device=x.device)
        places = torch.floor((number + 0.5 if exact else number) * ratio).to(torch.int64)
        x = along(x, dim, torch.clamp(places, max=size - 1))
    return x


def _cubic(distance: Any, sharpness: float) -> Any:
    """Keys' cubic filter; `sharpness` is its parameter, -0.75 in torch and -0.5 when it antialiases."""
    d, a = torch.abs(distance), sharpness
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((d - 5) * d + 8) * d * a - 4 * a
    return torch.where(d < 1, near, torch.where(d < 2, far, torch.zeros_like(d)))


def _weights(size: int, out: int, ratio: float, align_corners: bool, cubic: bool, device: Any) -> Any:
    """The matrix (out, size) of an interpolation; what lies outside counts as the border's element."""
    positions = _positions(out, ratio, align_corners, device)
    if not cubic:
        positions = torch.clamp(positions, min=0)
    base = torch.floor(positions)
    place = torch.arange(size, dtype=torch.float32, device=device)
    total = torch.zeros((out, size), device=device)
    for tap in (-1, 0, 1, 2) if cubic else (0, 1):
        distance = positions - (base + tap)
        weight = _cubic(distance, -0.75) if cubic else 1 - torch.abs(distance)
        reads = torch.clamp(base + tap, 0, size - 1)
        total = total + torch.where(place == reads.unsqueeze(1), weight.unsqueeze(1), torch.zeros_like(total))
    return total


def _antialiased(size: int, out: int, ratio: float, align_corners: bool, cubic: bool, device: Any) -> Any:
    """The matrix of a filter that is as wide as an output element, normalized inside the input."""
    support = (2.0 if cubic else 1.0) * max(ratio, 1.0)
    number = torch.arange(out, dtype=torch.float32, device=device).unsqueeze(1)
    center = (number + 0.5) * ratio
    place = torch.arange(size, dtype=torch.float32, device=device)
    low = torch.clamp(torch.floor(center - support + 0.5), min=0)
    high = torch.clamp(torch.floor(center + support + 0.5), max=size)
    distance = (place - center + 0.5) / max(ratio, 1.0)
    weight = _cubic(distance, -0.5) if cubic else torch.clamp(1 - torch.abs(distance), min=0)
    weight = torch.where(torch.logical_and(place >= low, place < high), weight, torch.zeros_like(weight))
    return weight / weight.sum(1, keepdim=True)


def _interpolate(
    x: Any,
    sizes: Sequence[int],
    factors: Sequence[float | None],
    align_corners: bool,
    cubic: bool,
    antialias: bool = False,
) -> Any:
    for i, (out, factor) in enumerate(zip(sizes, factors, strict=True)):
        dim, size = i + 2, x.shape[i + 2]
        ratio = _ratio(size, out, factor, align_corners)
        if out == size and ratio == 1.0:
            continue
        make = _antialiased if antialias else _weights
        weights = make(size, out, ratio, align_corners, cubic, x.device).to(x.dtype)
        x = torch.matmul(x.movedim(dim, -1), weights.t()).movedim(-1, dim)
    return x


def _vec(kind: str) -> Callable[..., Any]:
    """The rewrite of ``upsample_*.vec(input, output_size, [align_corners,] scale_factors)``."""
    if kind.startswith("nearest"):

        def nearest(x: Any, output_size: Any, scale_factors: Any) -> Any:
            return _nearest(x, *_sizes(x, output_size, scale_factors), exact=kind == "nearest_exact")

        return nearest

    def smooth(x: Any, output_size: Any, align_corners: bool, scale_factors: Any) -> Any:
        sizes, factors = _sizes(x, output_size, scale_factors)
        return _interpolate(x, sizes, factors, align_corners, kind.startswith("cubic"), kind.endswith("_aa"))

    return smooth


def rewrites() -> dict[Any, Callable[..., Any]]:
    """Rewrites of resizing."""
    found: dict[Any, Callable[..., Any]] = {}
    for rank in (1, 2, 3):
        found[getattr(aten, f"upsample_nearest{rank}d").vec] = _vec("nearest")
        found[getattr(aten, f"_upsample_nearest_exact{rank}d").vec] = _vec("nearest_exact")
    for name in ("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d"):
        found[getattr(aten, name).vec] = _vec("linear")
    found[aten.upsample_bicubic2d.vec] = _vec("cubic")
    found[aten._upsample_bilinear2d_aa.vec] = _vec("linear_aa")  # noqa: SLF001
    found[aten._upsample_bicubic2d_aa.vec] = _vec("cubic_aa")  # noqa: SLF001
    return found
