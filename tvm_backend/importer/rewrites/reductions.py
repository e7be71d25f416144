"""Reductions: the largest and the smallest with their place, means over no dimensions, extremes of everything."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["rewrites"]

aten = torch.ops.aten


def _extreme(values: Any, places: Any) -> Callable[..., Any]:
    def rewrite(x: Any, dim: int, keepdim: bool = False) -> Any:
        return values(x, [dim], keepdim), places(x, dim, keepdim)

    return rewrite


def _every_dimension(operator: Any) -> Callable[..., Any]:
    """No dimensions named means all of them, which relax takes for none."""

    def rewrite(x: Any, dim: Any = None, *options: Any, **named: Any) -> Any:
        if dim is None or len(dim):
            return NotImplemented
        return operator(x, list(range(x.dim())), *options, **named)

    return rewrite


def _dimensions(x: Any, dim: Any) -> list[int]:
    if isinstance(dim, int):
        return [dim]
    return list(range(x.dim())) if dim is None or not len(dim) else list(dim)


def _moments(x: Any, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    dims = _dimensions(x, dim)
    count: Any = 1
    for i in dims:
        count = count * x.shape[i]
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    total = (centred * centred).sum(dims, keepdim=keepdim)
    return total / (count - (1 if correction is None else correction)), mean


def _variance(x: Any, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    return _moments(x, dim, correction=correction, keepdim=keepdim)[0]


def _variance_and_mean(x: Any, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    variance, mean = _moments(x, dim, correction=correction, keepdim=keepdim)
    return variance, mean if keepdim else mean.squeeze(_dimensions(x, dim))


def _vector_norm(x: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    dims, size = _dimensions(x, dim), torch.abs(x if dtype is None else x.to(dtype))
    if ord == math.inf:
        return aten.amax(size, dims, keepdim)
    if ord == -math.inf:
        return aten.amin(size, dims, keepdim)
    if ord == 0:
        return (size != 0).to(size.dtype).sum(dims, keepdim=keepdim)
    if ord == 1:
        return size.sum(dims, keepdim=keepdim)
    if ord == 2:
        return torch.sqrt((size * size).sum(dims, keepdim=keepdim))
    return (size**ord).sum(dims, keepdim=keepdim) ** (1 / ord)


def _any(x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    """The converter's result has the type of `x`, not truth values; it has none for all dimensions."""
    if x.dtype == torch.bool and dim is not None:
        return NotImplemented
    return aten.any.dims(x != 0 if x.dtype != torch.bool else x, _dimensions(x, dim), keepdim)


def rewrites() -> dict[Any, Callable[..., Any]]:
    """Rewrites of reductions."""
    found: dict[Any, Callable[..., Any]] = {
        aten.max.dim: _extreme(aten.amax, aten.argmax),
        aten.min.dim: _extreme(aten.amin, aten.argmin),
        aten.var.correction: _variance,
        aten.var_mean.correction: _variance_and_mean,
        aten.linalg_vector_norm.default: _vector_norm,
        aten.any.default: _any,
        aten.any.dim: _any,
        aten.any.dims: _any,
    }
    for operator in (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default):
        found[operator] = _every_dimension(operator)
    return found
