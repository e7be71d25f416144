"""Pooling to sizes that do not divide, and padding by negative amounts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["adaptive_average", "pad_constant"]

aten = torch.ops.aten


def _weighted(x: Any, output_size: Sequence[int]) -> Any:
    """A matrix product with the windows' weights along each dimension."""
    rank = len(output_size)
    for i, count in enumerate(output_size):
        dim = x.dim() - rank + i
        size = x.shape[dim]
        number = torch.arange(count, device=x.device).unsqueeze(1)
        start, end = (number * size) // count, ((number + 1) * size + count - 1) // count
        place = torch.arange(size, device=x.device)
        inside = torch.logical_and(place >= start, place < end).to(x.dtype)
        weights = inside / (end - start).to(x.dtype)
        x = torch.matmul(x.movedim(dim, -1), weights.t()).movedim(-1, dim)
    return x


def adaptive_average(x: Any, output_size: Sequence[int]) -> Any:
    """Adaptive average pooling whose windows are of several widths."""
    sizes = x.shape[x.dim() - len(output_size) :]
    if all(
        isinstance(size, int) and size % count == 0 for size, count in zip(sizes, output_size, strict=True)
    ):
        return NotImplemented
    return _weighted(x, output_size)


def pad_constant(x: Any, pad: Sequence[int], value: float = 0) -> Any:
    """Negative padding cuts off."""
    if all(width >= 0 for width in pad):
        return NotImplemented
    for i in range(len(pad) // 2):
        dim = x.dim() - 1 - i
        x = aten.slice(x, dim, max(-pad[2 * i], 0), x.shape[dim] - max(-pad[2 * i + 1], 0))
    return aten.constant_pad_nd(x, [max(width, 0) for width in pad], value)
