"""What is read from, and written to, places that several tensors give: as one flat place; windows and sums at places."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

__all__ = ["along", "index", "index_put", "rewrites", "sum_dtype", "unfold"]

aten = torch.ops.aten
_MASKS = (torch.bool, torch.uint8)


def along(x: Any, dim: int, indices: Any) -> Any:
    """`x` at `indices`, a 1-d tensor of indices that are not negative, along one dimension."""
    return aten.index_select(x, dim, indices)


def _from_front(index: Any, size: Any) -> Any:
    index = index.to(torch.int64)
    return torch.where(index < 0, index + size, index)


def index(x: Any, indices: Any, unsafe: bool = False) -> Any:
    """Index tensors as one: the indexed dimensions are brought together and read with the index of their product."""
    where = [i for i, index in enumerate(indices) if index is not None]
    if any(indices[i].dtype in _MASKS for i in where):
        return NotImplemented  # a mask: the number of what it selects is not known
    tensors = [_from_front(indices[i], x.shape[i]) for i in where]
    if len(where) > 1:
        adjacent = where == list(range(where[0], where[-1] + 1))
        if not adjacent:  # torch puts the indices' dimensions in front
            rest = [i for i in range(x.dim()) if i not in where]
            x = x.permute([*where, *rest])
            where = list(range(len(where)))
        sizes = [x.shape[i] for i in where]
        flat: Any = 0
        for tensor, size in zip(tensors, sizes, strict=True):
            flat = tensor if isinstance(flat, int) else flat * size + tensor
        shape = list(x.shape)
        merged = 1
        for size in sizes:
            merged = merged * size
        x = x.reshape([*shape[: where[0]], merged, *shape[where[-1] + 1 :]])
        tensors = [flat]
    dim, (places,) = where[0], tensors
    taken = along(x, dim, places.reshape(-1))
    if places.dim() == 1:
        return taken
    return taken.reshape([*x.shape[:dim], *places.shape, *x.shape[dim + 1 :]])


def index_put(x: Any, indices: Any, values: Any, accumulate: bool = False) -> Any:
    """Rows scattered into `x` with the indexed dimensions in front, and flat."""
    where = [i for i, index in enumerate(indices) if index is not None]
    if not accumulate and len(where) == 1 and indices[where[0]].dtype == torch.bool and not values.dim():
        mask = indices[where[0]]  # y[y < 0] = 0
        behind = x.dim() - where[0] - mask.dim()
        return torch.where(mask.reshape([*mask.shape, *[1] * behind]), values.to(x.dtype), x)
    if any(indices[i].dtype in _MASKS for i in where):
        return NotImplemented
    order = [*where, *(i for i in range(x.dim()) if i not in where)]
    flat: Any = 0
    for i in where:
        tensor = _from_front(indices[i], x.shape[i])
        flat = tensor if isinstance(flat, int) else flat * x.shape[i] + tensor
    front = x.permute(order)
    rest = list(front.shape[len(where) :])
    rows = front.reshape([-1, math.prod(rest)])
    if where == list(
        range(where[0], where[-1] + 1)
    ):  # the indices' dimensions stand where the indexed ones stood
        whole = [*x.shape[: where[0]], *flat.shape, *x.shape[where[-1] + 1 :]]
        values = values.expand(whole)
        inner = range(where[0], where[0] + flat.dim())
        values = values.permute([*inner, *(i for i in range(values.dim()) if i not in inner)])
    else:
        values = values.expand([*flat.shape, *rest])
    places = flat.reshape([-1, 1]).expand([-1, rows.shape[1]])
    write = torch.scatter_add if accumulate else torch.scatter
    result = write(rows, 0, places, values.to(x.dtype).reshape([-1, rows.shape[1]]))
    inverse = sorted(range(x.dim()), key=order.__getitem__)
    return result.reshape(front.shape).permute(inverse)


def unfold(x: Any, dimension: int, size: int, step: int) -> Any:
    """Windows along a dimension, which becomes their number; the place in the window comes last."""
    dim = dimension % x.dim()
    count = (x.shape[dim] - size) // step + 1
    starts = torch.arange(count, device=x.device) * step
    taken = along(x, dim, (starts.unsqueeze(1) + torch.arange(size, device=x.device)).reshape(-1))
    taken = taken.reshape([*x.shape[:dim], count, size, *x.shape[dim + 1 :]])
    return taken.movedim(dim + 1, -1)


def _index_add(x: Any, dim: int, index: Any, source: Any, *, alpha: Any = 1) -> Any:
    shape = [1] * x.dim()
    shape[dim] = -1
    places = index.to(torch.int64).reshape(shape).expand(source.shape)
    return torch.scatter_add(x, dim, places, source if alpha == 1 else source * alpha)


def _fitted(operator: Any) -> Callable[..., Any]:
    """Of what is written, the part that there are indices for."""

    def rewrite(x: Any, dim: int, index: Any, source: Any, *mode: Any, **options: Any) -> Any:
        same = all(
            a is b or (isinstance(a, int) and isinstance(b, int) and a == b)
            for a, b in zip(index.shape, source.shape, strict=True)
        )
        if same or statically_known_true(index.numel() == source.numel()):
            return NotImplemented
        for axis, size in enumerate(index.shape):
            source = aten.slice(source, axis, 0, size)
        return operator(x, dim, index, source, *mode, **options)

    return rewrite


def _max_unpool(x: Any, indices: Any, output_size: Any) -> Any:
    whole = [*x.shape[:-2], *output_size]
    flat = torch.zeros([*x.shape[:-2], math.prod(output_size)], dtype=x.dtype, device=x.device)
    return torch.scatter(flat, -1, indices.flatten(-2), x.flatten(-2)).reshape(whole)


def _searchsorted(
    borders: Any,
    values: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Any = None,
) -> Any:
    """How many of the borders a value has passed, or reached."""
    if sorter is not None:
        return NotImplemented
    borders, values = borders.unsqueeze(-2), values.unsqueeze(-1)
    passed = borders <= values if right or side == "right" else borders < values
    return passed.to(torch.int64).sum(-1).to(torch.int32 if out_int32 else torch.int64)


def _cdist(x: Any, y: Any, p: float = 2.0, compute_mode: Any = None) -> Any:
    apart = torch.abs(x.unsqueeze(-2) - y.unsqueeze(-3))
    if p == 2:
        return torch.sqrt((apart * apart).sum(-1))
    if p == 1:
        return apart.sum(-1)
    if p == math.inf:
        return aten.amax(apart, [-1])
    return NotImplemented if p == 0 else (apart**p).sum(-1) ** (1 / p)


def sum_dtype(x: Any, dtype: Any = None) -> torch.dtype:
    """The type in which torch adds up or multiplies `x`: of whole numbers and truth values that with 64 bits."""
    whole = not x.is_floating_point() and not x.is_complex()
    return dtype or (torch.int64 if whole else x.dtype)


def _cumprod(x: Any, dim: int, *, dtype: Any = None) -> Any:
    """Products of twice as many neighbours each time."""
    x = x.to(sum_dtype(x, dtype))
    if not x.dim():
        return x.clone()
    dim, size, reach = dim % x.dim(), x.shape[dim], 1
    if not isinstance(size, int):
        return NotImplemented
    while reach < size:
        ones = torch.ones_like(aten.slice(x, dim, 0, reach))
        x = x * torch.cat([ones, aten.slice(x, dim, 0, size - reach)], dim)
        reach *= 2
    return x


def _kthvalue(x: Any, k: int, dim: int = -1, keepdim: bool = False) -> Any:
    dim %= x.dim()
    found = torch.topk(x, k, dim, largest=False, sorted=True)
    last = [aten.slice(each, dim, k - 1, k) for each in found]
    return tuple(each if keepdim else each.squeeze(dim) for each in last)


def _median(x: Any, dim: int, keepdim: bool = False) -> Any:
    size = x.shape[dim]
    return _kthvalue(x, (size + 1) // 2, dim, keepdim) if isinstance(size, int) else NotImplemented


def _as_strided(x: Any, size: Any, stride: Any, storage_offset: int | None = None) -> Any:
    """What is only laid out anew, as torch does behind the mean of an image whose channels come last, stays as it is."""
    if len(size) != x.dim() or storage_offset not in (None, x.storage_offset()):
        return NotImplemented
    same = all(
        statically_known_true(new == old) and (new == 1 or statically_known_true(step == old_step))
        for new, step, old, old_step in zip(size, stride, x.shape, x.stride(), strict=True)
    )
    return x.clone() if same else NotImplemented


def rewrites() -> dict[Any, Callable[..., Any]]:
    """Rewrites of what neither knows."""
    return {
        **{
            each: _fitted(each)
            for each in (aten.scatter.src, aten.scatter_add.default, aten.scatter_reduce.two)
        },
        aten.as_strided.default: _as_strided,
        aten.index_put.default: index_put,
        aten.unfold.default: unfold,
        aten.index_add.default: _index_add,
        aten.max_unpool2d.default: _max_unpool,
        aten.searchsorted.Tensor: _searchsorted,
        aten.cdist.default: _cdist,
        aten._cdist_forward.default: _cdist,  # noqa: SLF001
        aten.cumprod.default: _cumprod,
        aten.kthvalue.default: _kthvalue,
        aten.median.dim: _median,
    }
