"""Error-compensated rounding in closed form: the integers that reproduce a layer's outputs, without gradients.

For one output channel the mean squared output error of integers ``q`` on the grid ``(s, z)`` is, up to a constant,
``(s (q - z) - w*)' H (s (q - z) - w*)`` with ``H`` the covariance of the layer's quantized inputs and ``w*`` the
least-squares weight that maps these inputs to the full-precision outputs.  Three steps bring it down:

1. ``w*`` by ridge regression towards the trained weight (it takes up what quantized inputs have done already), the ridge
   chosen by fitting one half of the calibration batches and judging on the other;
2. one pass of optimal-brain rounding, column by column, each column's error spread over those still free (Frantar et
   al., "GPTQ", arXiv 2210.17323, equations 2 and 3, after "Optimal Brain Compression", arXiv 2208.11580);
3. sweeps of cyclic coordinate descent over the integers, alternating with the closed-form scale
   ``s = (q - z)' H w* / (q - z)' H (q - z)`` (Zhang et al., "COMQ", arXiv 2403.07134, section 3); where groups of a channel's
   inputs have scales of their own, each in turn the best beside the others.

Several starting scales are carried along as extra rows and the best is kept for each channel.  The bias is the mean
that is left (:mod:`cat_plugin.ptq.closed_form.bias_correction`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cat_plugin.ptq.closed_form.coordinate_descent import descend
from cat_plugin.ptq.closed_form.grids import by_column, times
from cat_plugin.ptq.closed_form.moments import Moments
from cat_plugin.ptq.closed_form.optimal_brain import spread_rounding

__all__ = ["fit_integers", "least_squares_weight", "ridge_by_halves"]

_ATTEMPTS = 8  # at a factorisation, with more ridge each time
_ROWS = 8192  # channels fitted at once


def least_squares_weight(weight: Tensor, moments: Moments, ridge: float) -> Tensor:
    """Weight that maps the quantized inputs to the full-precision outputs best.

    Parameters
    ----------
    weight : Tensor
        (G, R, K) trained weight.
    moments : Moments
        Of the quantized inputs and the full-precision outputs.
    ridge : float
        Pull towards ``weight``, as a share of the mean input variance.

    Returns
    -------
    Tensor
        (G, R, K) float64.
    """
    k = moments.h.shape[1]
    strength = ridge * moments.h.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    eye = torch.eye(k, dtype=torch.float64, device=weight.device)
    trained = weight.double()
    for _ in range(_ATTEMPTS):
        pull = strength.reshape(-1, 1, 1)
        right = moments.c + (trained * pull).transpose(1, 2)
        factor, failed = torch.linalg.cholesky_ex(moments.h + eye * pull)
        if not bool(failed.any()):
            result = torch.cholesky_solve(right, factor).transpose(1, 2)
            if bool(torch.isfinite(result).all()):
                return result
        strength = strength * 10
    return trained.clone()


def ridge_by_halves(weight: Tensor, moments: Moments, candidates: tuple[float, ...]) -> float:
    """Ridge whose weight, fitted to one half of the calibration batches, errs least on the other.

    A layer with more inputs than calibration samples could otherwise be made to fit these perfectly.

    Parameters
    ----------
    weight : Tensor
        (G, R, K) trained weight.
    moments : Moments
        With its halves; without, the last candidate is taken.
    candidates : tuple of float
        Ridges, ascending; ties go to the smaller.

    Returns
    -------
    float
        One of the candidates.
    """
    if len(moments.halves) < 2:
        return candidates[-1]
    losses = []
    for ridge in candidates:
        loss = 0.0
        for fitted, judge in (moments.halves, moments.halves[::-1]):
            w = least_squares_weight(weight, fitted, ridge)
            # the squared error but for the outputs' own variance, which no weight changes
            loss += float((torch.bmm(w, judge.h) * w).sum() - 2.0 * (w * judge.c.transpose(1, 2)).sum())
        losses.append(loss)
    return min(zip(losses, candidates, strict=True))[1]


def fit_integers(
    target: Tensor,
    moments: Moments,
    scale: Tensor,
    zero_point: Tensor,
    qrange: tuple[int, int],
    *,
    damping: float = 0.01,
    sweeps: int = 8,
    factors: tuple[float, ...] = (0.8, 0.9, 1.0, 1.1, 1.25),
    trial: int | None = None,
    modulation: Tensor | None = None,
    neighbours: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Integers and scales of least output error.

    Parameters
    ----------
    target : Tensor
        (G, R, K) weight to reproduce, from :func:`least_squares_weight`.
    moments : Moments
        Of the quantized inputs.
    scale, zero_point : Tensor
        (G, R) initial grid, or (G, R, Q) where Q groups of equally many inputs have grids of their own; the zero point stays.
    qrange : tuple of int
        Least and greatest integer.
    damping : float
        Added to the covariance's diagonal, as a share of its mean.
    sweeps : int
        Passes of coordinate descent.
    factors : tuple of float
        Starting scales tried, as multiples of ``scale``.
    trial : int or None
        Passes after which the best starting scale of each channel alone goes on; None compares them at the end.
    modulation : Tensor or None
        (G, R, K) what the steps are multiplied by.
    neighbours : Tensor or None
        (K, n) inputs whose integers are kept from exceeding :data:`~cat_plugin.ptq.quantizers.neighbours.LIMIT` together; only where
        zero points are 0.

    Returns
    -------
    integers : Tensor
        (G, R, K) int8.
    scale : Tensor
        float32 of the shape that was given.
    """
    if target.shape[1] > _ROWS:  # rows do not depend on each other
        given = (target, scale, zero_point, *(() if modulation is None else (modulation,)))
        pieces = [torch.split(values, _ROWS, 1) for values in given]
        effort: dict[str, Any] = {
            "damping": damping,
            "sweeps": sweeps,
            "factors": factors,
            "trial": trial,
            "neighbours": neighbours,
        }
        found = [
            fit_integers(part, moments, s, z, qrange, **effort, modulation=next(iter(m), None))
            for part, s, z, *m in zip(*pieces, strict=True)
        ]
        return torch.cat([q for q, _ in found], 1), torch.cat([s for _, s in found], 1)
    low, high = qrange
    g, r, k = target.shape
    h = moments.h.clone()
    mean = h.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    h += torch.eye(k, dtype=h.dtype, device=h.device) * (damping * mean).reshape(-1, 1, 1)
    many = len(factors)
    factor = torch.tensor(factors, device=scale.device, dtype=torch.float32).reshape(1, many, 1, 1)
    scales = (scale.float().reshape(g, 1, r, -1) * factor).flatten(1, 2)
    zeros = zero_point.reshape(g, 1, r, -1).expand(g, many, r, -1).flatten(1, 2)
    targets = target.unsqueeze(1).expand(g, many, r, k).reshape(g, many * r, k)
    many_m = None if modulation is None else modulation.float().repeat(1, many, 1)
    q = spread_rounding(targets, h, scales, zeros, low, high, many_m, neighbours)
    tried = sweeps if trial is None else min(trial, sweeps)
    hf = h.float()
    pull = torch.bmm(target.float(), hf)
    many_pull = pull.repeat(1, many, 1)
    q, scales, residual = descend(q, many_pull, hf, scales, zeros, low, high, tried, many_m, neighbours)
    error = times((q - by_column(zeros, k)) * by_column(scales, k), many_m) - targets.float()
    losses = (-residual if residual is not None else torch.bmm(error, hf)).mul_(error).sum(2)
    pick = losses.reshape(g, many, r).argmin(1, keepdim=True)
    q = q.reshape(g, many, r, k).gather(1, pick.unsqueeze(3).expand(g, 1, r, k)).squeeze(1)
    scales = scales.reshape(g, many, r, -1)
    chosen = scales.gather(1, pick.unsqueeze(3).expand(g, 1, r, scales.shape[3])).squeeze(1)
    if tried < sweeps:
        zeros = zero_point.reshape(g, r, -1)
        q, chosen, _ = descend(q, pull, hf, chosen, zeros, low, high, sweeps - tried, modulation, neighbours)
    return q.to(torch.int8), chosen.reshape(scale.shape)
