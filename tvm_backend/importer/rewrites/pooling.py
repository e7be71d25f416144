"""Pooling whose converters drop an argument, or that have none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cat_plugin.graph.rewrites.indexing import along
from cat_plugin.graph.rewrites.pooling import adaptive_average

__all__ = ["rewrites"]

aten = torch.ops.aten
_AVERAGE = {1: aten.avg_pool1d, 2: aten.avg_pool2d, 3: aten.avg_pool3d}
_MAXIMUM = {2: aten.max_pool2d_with_indices, 3: aten.max_pool3d_with_indices}


def _each(value: Any, rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def _beyond(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """How many elements the last window reaches beyond the padded input.

    With `ceil_mode` a window may, but it starts inside the input or its padding on the left.
    """
    span = dilation * (kernel - 1) + 1
    steps = (size + 2 * padding - span) / stride
    count = (math.ceil(steps) if ceil_mode else math.floor(steps)) + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1
    return max((count - 1) * stride + span - (size + 2 * padding), 0)


def _average(rank: int) -> Callable[..., Any]:
    def rewrite(
        x: Any,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Any:
        """The mean over zero-padded windows, times what makes of it the mean that was asked for."""
        kernel = _each(kernel_size, rank)
        strides = _each(stride, rank) if stride else kernel
        pads = _each(padding, rank)
        plain = not ceil_mode and (count_include_pad or not any(pads))
        if divisor_override is None and plain:
            return NotImplemented
        sizes = list(x.shape[-rank:])
        beyond = [_beyond(*item, 1, ceil_mode) for item in zip(sizes, kernel, strides, pads, strict=True)]
        ends = [
            width
            for low, more in zip(reversed(pads), reversed(beyond), strict=True)
            for width in (low, low + more)
        ]
        pool = _AVERAGE[rank]
        mean = pool(aten.constant_pad_nd(x, ends), kernel, strides)
        if divisor_override is not None:
            return mean * (math.prod(kernel) / divisor_override)
        if count_include_pad:
            ends = [width for more in reversed(beyond) for width in (0, more)]
            sizes = [size + 2 * pad for size, pad in zip(sizes, pads, strict=True)]
        ones = torch.ones([1] * (x.dim() - rank) + sizes, dtype=x.dtype, device=x.device)
        return mean * torch.reciprocal(pool(aten.constant_pad_nd(ones, ends), kernel, strides))

    return rewrite


def _maximum(rank: int) -> Callable[..., Any]:
    def rewrite(
        x: Any,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,),
        ceil_mode: bool = False,
    ) -> Any:
        """Windows that reach beyond the input find minus infinity there."""
        if not ceil_mode and stride:
            return NotImplemented
        kernel, pads, dilations = (_each(v, rank) for v in (kernel_size, padding, dilation))
        strides = _each(stride, rank) if stride else kernel
        pool = _MAXIMUM[rank]
        beyond = [
            _beyond(*item, ceil_mode)
            for item in zip(x.shape[-rank:], kernel, strides, pads, dilations, strict=True)
        ]
        if not any(beyond):
            return pool(x, kernel, strides, pads, dilations)
        ends = [
            width
            for low, more in zip(reversed(pads), reversed(beyond), strict=True)
            for width in (low, low + more)
        ]
        return pool(aten.constant_pad_nd(x, ends, -math.inf), kernel, strides, [0] * rank, dilations)

    return rewrite


def _windows(x: Any, dim: int, count: int) -> tuple[Any, Any]:
    """The windows of an adaptive pooling along `dim`, which becomes two: their number and their width.

    Windows differ in width by one at most; a shorter one repeats its last element, which a maximum does not notice.
    Beside them, where each element comes from, (number, width).
    """
    size = x.shape[dim]
    number = torch.arange(count, device=x.device)
    start = (number * size) // count
    end = ((number + 1) * size + count - 1) // count
    width = max(-(-((i + 1) * size) // count) - (i * size) // count for i in range(count))
    steps = torch.arange(width, device=x.device)
    places = torch.minimum(start.unsqueeze(1) + steps, end.unsqueeze(1) - 1)
    taken = along(x, dim, places.reshape(-1))
    return taken.reshape([*x.shape[:dim], count, width, *x.shape[dim + 1 :]]), places


def _adaptive_maximum(x: Any, output_size: Sequence[int]) -> Any:
    """The largest element of each window, and its place in the input laid out flat."""
    rank = len(output_size)
    first = x.dim() - rank
    values = x
    for i, count in enumerate(output_size):
        values = aten.amax(_windows(values, first + i, count)[0], [first + i + 1])
    spread, places = x, []
    for i, count in enumerate(output_size):
        spread, found = _windows(spread, first + 2 * i, count)
        shape = [1] * (2 * rank)
        shape[i], shape[rank + i] = found.shape
        places.append(found.reshape(shape))
    order = [*range(first), *range(first, first + 2 * rank, 2), *range(first + 1, first + 2 * rank, 2)]
    flat: Any = 0
    for place, size in zip(places, x.shape[first:], strict=True):
        flat = flat * size + place
    inner = [window.shape[rank + i] for i, window in enumerate(places)]
    flat = flat.expand([*output_size, *inner]).reshape([*output_size, math.prod(inner)])
    spread = spread.permute(order).reshape([*x.shape[:first], *output_size, math.prod(inner)])
    best = torch.argmax(spread, -1, keepdim=True)
    return values, torch.gather(flat.expand([*spread.shape]), -1, best).squeeze(-1)


def rewrites() -> dict[Any, Callable[..., Any]]:
    """Rewrites of pooling."""
    found: dict[Any, Callable[..., Any]] = {pool.default: _average(rank) for rank, pool in _AVERAGE.items()}
    found.update({pool.default: _maximum(rank) for rank, pool in _MAXIMUM.items()})
    found[aten.adaptive_max_pool2d.default] = _adaptive_maximum
    found[aten.adaptive_max_pool3d.default] = _adaptive_maximum
    found[aten._adaptive_avg_pool2d.default] = adaptive_average  # noqa: SLF001
    found[aten._adaptive_avg_pool3d.default] = adaptive_average  # noqa: SLF001
    return found
