"""Indices counted from the front and inside their bounds: TVM's ``take`` reads whatever memory an index points to.

What is read at known places is read by slices, which move integers as well as the numbers they stand for, where the passes
know neither ``take`` nor ``split``.  Several index tensors are one, since what TVM makes of them beside whole dimensions is their
outer product, where torch pairs them; what is broadcast to the shape that it has stays as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from cat_plugin.graph.rewrites import indexing
from cat_plugin.graph.rewrites.indexing import along
from cat_plugin.graph.rewrites.sampling import grid_sample

__all__ = ["rewrites"]

aten = torch.ops.aten


def _select(x: Any, dim: int, index: Any) -> Any:
    dim %= x.dim()
    size = x.shape[dim]
    # The size of the batch dimension, and an index that depends on it, are no numbers.
    start = index + size if isinstance(index, int) and index < 0 else index
    return torch.squeeze(aten.slice(x, dim, start, start + 1), dim)


def _bound(value: Any, size: Any, default: Any) -> Any:
    if value is None:
        return default
    if not isinstance(value, int):
        return value
    if isinstance(size, int):
        return min(max(value + size if value < 0 else value, 0), size)
    return size + value if value < 0 else (size if value >= 2**62 else value)


def _slice(x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    if dim < 0:
        return aten.slice(x, dim % x.dim(), start, end, step)
    size = x.shape[dim]
    low, high = _bound(start, size, 0), _bound(end, size, size)
    whole = isinstance(low, int) and low == 0 and step == 1
    if whole and (high is size or (isinstance(high, int) and isinstance(size, int) and high == size)):
        return x.clone()
    if isinstance(high, int) and isinstance(low, int):
        high = max(low, high)
    if not all(isinstance(value, int) for value in (size, low, high)):
        # Of the batch: TVM's slice has a size there that it does not simplify, and then broadcasts wrongly.
        return along(x, dim, torch.arange(low, high, step, device=x.device))
    if all(a is b or (isinstance(a, int) and a == b) for a, b in ((low, start), (high, end))):
        return NotImplemented
    return aten.slice(x, dim, low, high, step)


def _split(x: Any, sizes: Any, dim: int = 0) -> Any:
    dim %= x.dim()
    ends = list(itertools.accumulate(sizes))
    return [aten.slice(x, dim, end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _expand(x: Any, sizes: Any, *, implicit: bool = False) -> Any:
    del implicit
    same = len(sizes) == x.dim() and all(
        (isinstance(size, int) and size == -1) or statically_known_true(size == own)
        for size, own in zip(sizes, x.shape, strict=True)
    )
    return x.clone() if same else NotImplemented


def _repeat(x: Any, counts: Any) -> Any:
    """As often as there are rows: by a broadcast, since TVM's ``tile`` takes numbers alone."""
    if all(isinstance(count, int) for count in counts):
        return NotImplemented
    shape = [*[1] * (len(counts) - x.dim()), *x.shape]
    spread = x.reshape([part for size in shape for part in (1, size)])
    spread = spread.expand(
        [part for count, size in zip(counts, shape, strict=True) for part in (count, size)]
    )
    return spread.reshape([count * size for count, size in zip(counts, shape, strict=True)])


def _empty(size: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, **_: Any) -> Any:
    """What nobody reads before it is written."""
    return torch.zeros(size, dtype=dtype, layout=layout, device=device)


def _narrow(x: Any, dim: int, start: Any, length: Any) -> Any:
    start = start + x.shape[dim] if isinstance(start, int) and start < 0 else start
    return aten.slice(x, dim, start, start + length)


def _squeeze(x: Any, dims: Any = None) -> Any:
    """Only the dimensions of one element; the converter refuses others, where torch leaves them."""
    given = range(x.dim()) if dims is None else [dims] if isinstance(dims, int) else dims
    chosen = {dim % max(x.dim(), 1) for dim in given}
    shape = list(x.shape)
    kept = [size for i, size in enumerate(shape) if not (i in chosen and isinstance(size, int) and size == 1)]
    return x.view(kept) if len(kept) < len(shape) else x.clone()


def _cat(tensors: Any, dim: int = 0) -> Any:
    """Without parts that hold nothing, such as channels behind the last one."""
    full = [x for x in tensors if not (x.ndim and isinstance(x.shape[dim], int) and x.shape[dim] == 0)]
    if not full or len(full) == len(tensors):
        return NotImplemented
    return torch.cat(full, dim) if len(full) > 1 else full[0].clone()


def rewrites() -> dict[Any, Callable[..., Any]]:
    """Rewrites of operators that read part of a tensor."""
    return {
        **indexing.rewrites(),
        aten.grid_sampler_2d.default: grid_sample,
        aten.cat.default: _cat,
        aten.select.int: _select,
        aten.slice.Tensor: _slice,
        aten.narrow.default: _narrow,
        aten.repeat.default: _repeat,
        aten.empty.memory_format: _empty,
        aten.split_with_sizes.default: _split,
        aten.expand.default: _expand,
        aten.index.Tensor: indexing.index,
        aten._unsafe_index.Tensor: indexing.index,  # noqa: SLF001
        aten.squeeze.default: _squeeze,
        aten.squeeze.dim: _squeeze,
        aten.squeeze.dims: _squeeze,
    }
