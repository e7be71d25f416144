"""Tells from what a function makes of numbers whether it is a layer norm, an RMS norm or a softmax, and with which parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["Norm", "norm_of"]

#: Rows that a function is tried on; two would do for weight and bias.
_ROWS = 6
#: Further rows, on which it must be the norm that it looks like.
_ODD_ROWS = 10
#: Largest tensor that a function is tried on.
_MOST = 1 << 22
_TOLERANCE = 2e-5


@dataclass(frozen=True, eq=False)
class Norm:
    """A function of the values along some axes.

    Attributes
    ----------
    kind : str
        ``layer_norm``, ``rms_norm``, ``softmax`` or ``log_softmax``.
    axes : tuple of int
        The last ones, or a single one, from the front.
    eps : float
        Of a norm.
    weight, bias : Tensor of shape (sizes of the axes), optional
        Of a norm; None where they are one and zero.
    """

    kind: str
    axes: tuple[int, ...]
    eps: float = 0.0
    weight: Tensor | None = None
    bias: Tensor | None = None


def norm_of(
    function: Callable[[Tensor], Tensor | None],
    source: fx.Node,
    axes: Iterable[tuple[int, ...]],
    epsilons: Iterable[float],
) -> Norm | None:
    """Find which norm a function is.

    Parameters
    ----------
    function : callable
        From a tensor, float64, to a tensor; None where it does not run.
    source : Node
        What stands for the function's argument; the first axis of its value is the batch.
    axes : iterable of tuple of int
        Axes that may be normalized over.
    epsilons : iterable of float
        What may be added to a variance.

    Returns
    -------
    Norm or None
    """
    _, *sizes = source.meta["val"].shape
    if not sizes or not all(isinstance(size, int) for size in sizes):
        return None
    if _ODD_ROWS * torch.Size(sizes).numel() > _MOST:
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS, *sizes, dtype=torch.float64, generator=generator) + 0.5
    # Rows of different size, of which the smallest show the epsilon.
    x *= torch.logspace(0.5, -3.5, _ROWS, dtype=torch.float64).view(-1, *[1] * len(sizes))
    y = function(x)
    if y is None or y.shape != x.shape or not torch.isfinite(y).all():
        return None
    for along in axes:
        last = tuple(range(x.ndim - len(along), x.ndim))
        if 0 not in along and (along == last or len(along) == 1):
            softmax = _softmax(x, y, along)
            for found in _norms(x, y, along, epsilons) if softmax is None else [softmax]:
                odd = _odd_rows(x, found)
                if _same_where_finite(function(odd), _computed(found, odd)):
                    return found
    return None


def _odd_rows(x: Tensor, norm: Norm) -> Tensor:
    """Rows (R, ...) that bounds and epsilons of any kind show in: zeros, constants, single large values, large and low rows."""
    width = torch.Size([x.shape[axis] for axis in norm.axes]).numel()
    largest = 0 if norm.weight is None else int(norm.weight.abs().argmax())
    kept = [x.shape[axis] for axis in _others(x, norm)[1:]]
    flat = torch.zeros(_ODD_ROWS, *kept, width, dtype=x.dtype)
    flat[1] = 2.0
    for row, place in enumerate((0, largest, width - 1)):
        flat[2 + 2 * row, ..., place] = 1e4
        flat[3 + 2 * row, ..., place] = -1e4
    order = [*_others(x, norm), *norm.axes]
    odd: Tensor = flat.reshape(_ODD_ROWS, *kept, *[x.shape[axis] for axis in norm.axes])
    odd = odd.permute([order.index(axis) for axis in range(x.ndim)]).contiguous()
    odd[-2] = x[0] * 300
    odd[-1] = x[0] - 100
    return odd


def _others(x: Tensor, norm: Norm) -> list[int]:
    return [axis for axis in range(x.ndim) if axis not in norm.axes]


def _computed(norm: Norm, x: Tensor) -> Tensor:
    """What a norm makes of a tensor."""
    if norm.kind in ("softmax", "log_softmax"):
        return torch.softmax(x, norm.axes[0]) if norm.kind == "softmax" else x.log_softmax(norm.axes[0])
    centred = x - x.mean(norm.axes, keepdim=True) if norm.kind == "layer_norm" else x
    y = centred / (centred.square().mean(norm.axes, keepdim=True) + norm.eps).sqrt()
    shape = [size if axis in norm.axes else 1 for axis, size in enumerate(x.shape)]
    y = y if norm.weight is None else y * norm.weight.double().reshape(shape)
    return y if norm.bias is None else y + norm.bias.double().reshape(shape)


def _same_where_finite(found: Tensor | None, expected: Tensor) -> bool:
    """Whether two tensors are the same wherever the first is a number, as an exponential in pieces is not everywhere."""
    if found is None or found.shape != expected.shape:
        return False
    finite = torch.isfinite(found)
    return _same(expected[finite], found[finite])


def _same(found: Tensor, expected: Tensor) -> bool:
    if not expected.numel():
        return False
    return float((found - expected).abs().max()) <= _TOLERANCE * float(expected.abs().max())


def _softmax(x: Tensor, y: Tensor, axes: tuple[int, ...]) -> Norm | None:
    if len(axes) != 1 or x.shape[axes[0]] < 2:
        return None
    for kind, function in (("softmax", torch.softmax), ("log_softmax", torch.log_softmax)):
        if _same(y, function(x, axes[0])):
            return Norm(kind, axes)
    return None


def _norms(x: Tensor, y: Tensor, axes: tuple[int, ...], epsilons: Iterable[float]) -> Iterator[Norm]:
    """The norms that a function may be, by what it makes of ordinary rows."""
    shape = [x.shape[axis] for axis in axes]
    others = [axis for axis in range(x.ndim) if axis not in axes]
    width = torch.Size(shape).numel()
    if width < 2:
        return
    x, y = (each.permute(*others, *axes).reshape(-1, width) for each in (x, y))
    centred = x - x.mean(1, keepdim=True)
    for kind, values in (("layer_norm", centred), ("rms_norm", x)):
        power = values.square().mean(1, keepdim=True)
        for eps in epsilons:
            weight, bias, error = _affine(values / (power + eps).sqrt(), y)
            if error > _TOLERANCE * float(y.abs().max()):
                continue
            none = float(bias.abs().max()) <= _TOLERANCE * float(y.abs().max())
            if kind == "rms_norm" and not none:
                continue
            tensors: list[Any] = [
                None if (weight - 1).abs().max() < 1e-6 and none else weight.float().reshape(shape),
                None if none else bias.float().reshape(shape),
            ]
            yield Norm(kind, axes, eps, *tensors)


def _affine(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """Slope and offset of each column by least squares, and the largest error."""
    dx, dy = x - x.mean(0), y - y.mean(0)
    weight = (dx * dy).sum(0) / dx.square().sum(0).clamp_min(1e-300)
    bias = y.mean(0) - weight * x.mean(0)
    return weight, bias, float((weight * x + bias - y).abs().max())
