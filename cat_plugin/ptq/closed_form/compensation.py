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

from cat_plugin.ptq.closed_form.moments import Moments
from cat_plugin.ptq.quantizers.pairs import LIMIT, bounded

__all__ = ["fit_integers", "least_squares_weight", "ridge_by_halves"]

_ATTEMPTS = 8  # at a factorisation, with more ridge each time
_ROWS = 8192  # channels fitted at once
_WIDE = 1024  # inputs from which on a residual goes from sweep to sweep, as exact as float32 adds up, and is not computed anew
_BLOCK = 64  # columns whose errors are gathered before they are spread over the rest by one matrix product


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
        solution, failed = torch.linalg.solve_ex(moments.h + eye * pull, right)
        if not bool(failed.any()) and bool(torch.isfinite(solution).all()):
            result: Tensor = solution.transpose(1, 2)
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


def _inverse_factor(h: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of each (K, K) matrix, with as much ridge as rounding errors ask for.

    What cannot be factored with any (it holds NaN or infinities) gets the identity: rounding to nearest.
    """
    eye = torch.eye(h.shape[1], dtype=h.dtype, device=h.device)
    ridge = h.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12).reshape(-1, 1, 1) * 1e-9
    for _ in range(_ATTEMPTS):
        factor, failed = torch.linalg.cholesky_ex(h + ridge * eye)
        if not bool(failed.any()):
            inverse = torch.cholesky_inverse(factor)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not bool(failed.any()) and bool(torch.isfinite(upper).all()):
                result: Tensor = upper.float()
                return result
        ridge = ridge * 100
    return eye.float().expand(h.shape).clone()


def _beside_(q: Tensor, other: Tensor) -> Tensor:
    """`q` clamped in place to what may stand beside the integers of its neighbours."""
    return q.clamp_(-LIMIT - other.clamp(max=0), LIMIT - other.clamp(min=0))


def _spread_rounding(
    target: Tensor,
    h: Tensor,
    scale: Tensor,
    zero: Tensor,
    low: int,
    high: int,
    modulation: Tensor | None,
    neighbours: Tensor | None,
) -> Tensor:
    """Step 2 for (G, R, K) targets; returns the integers as floats."""
    g, _, k = target.shape
    order = h.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    index = order.unsqueeze(1).expand_as(target)
    rows = torch.arange(g, device=h.device).reshape(-1, 1, 1)
    permuted = h[rows, order.unsqueeze(2), order.unsqueeze(1)]
    upper = _inverse_factor(permuted)
    work = target.gather(2, index).float().clone()
    integers = torch.empty_like(work)
    s, z = (_by_column(values.float(), k, order) for values in (scale, zero))
    if modulation is not None:
        s = s * modulation.gather(2, index)
    if neighbours is not None:  # of a pair, the integer that is not chosen yet is taken to be near its target
        beside = order.argsort(1).gather(1, neighbours[order])
        free = beside == torch.arange(k, device=h.device)
        steps = _times(_by_column(scale.float(), k), modulation)
        expected = bounded(target.float() / steps, neighbours)
        integers.copy_(expected.gather(2, index).round_())
    for start in range(0, k, _BLOCK):
        end = min(start + _BLOCK, k)
        block, s_b, z_b = (_columns_first(values[:, :, start:end]) for values in (work, s, z))
        errors = torch.empty_like(block)
        for j in range(end - start):
            column, row = block[:, j], upper[:, start + j, start:end]
            q = (column / s_b[:, j] + z_b[:, j]).round_().clamp_(low, high)
            if neighbours is not None:
                other = integers.gather(2, beside[:, start + j].reshape(-1, 1, 1).expand(-1, q.shape[1], 1))
                _beside_(q, other.squeeze(2).masked_fill(free[:, start + j].unsqueeze(1), 0.0))
            integers[:, :, start + j] = q
            errors[:, j] = (column - (q - z_b[:, j]) * s_b[:, j]) / row[:, j].unsqueeze(1)
            block[:, j + 1 :] -= errors[:, j].unsqueeze(1) * row[:, j + 1 :].unsqueeze(2)
        work[:, :, end:] -= torch.bmm(errors.transpose(1, 2), upper[:, start:end, end:])
    return torch.empty_like(integers).scatter_(2, index, integers)


def _columns_first(values: Tensor) -> Tensor:
    """(G, C, R) copy of (G, R, C) values, in which a column lies in one piece."""
    return values.transpose(1, 2).contiguous()


def _by_column(values: Tensor, k: int, order: Tensor | None = None) -> Tensor:
    """(G, R, K) view or copy of a grid's (G, R, Q) values for each of K columns, in (G, K) order; Q groups divide K."""
    groups = values.shape[2]
    if groups == 1:
        return values.expand(-1, -1, k)
    spread = values.repeat_interleave(k // groups, 2)
    return spread if order is None else spread.gather(2, order.unsqueeze(1).expand_as(spread))


def _times(values: Tensor, modulation: Tensor | None) -> Tensor:
    return values if modulation is None else values * modulation


def _best_scales(centred: Tensor, pull: Tensor, hf: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(G, R, Q) scales of least error for (G, R, K) integers less zero point, and the residual ``H (w* - w)``."""
    groups, width = scale.shape[2], centred.shape[2] // scale.shape[2]
    if groups == 1:
        through = torch.bmm(centred, hf)
        denominator = (through * centred).sum(2, keepdim=True)
        best = (centred * pull).sum(2, keepdim=True) / denominator.clamp(min=1e-20)
        scale = torch.where((denominator > 1e-20) & (best > 0), best, scale)
        return scale, pull - through * scale
    residual = pull - torch.bmm(centred * _by_column(scale, centred.shape[2]), hf)
    scale = scale.clone()
    for group in range(groups):
        columns = slice(group * width, (group + 1) * width)
        own, rows = centred[:, :, columns], hf[:, columns]
        denominator = (torch.bmm(own, rows[:, :, columns]) * own).sum(2)
        step = (own * residual[:, :, columns]).sum(2) / denominator.clamp(min=1e-20)
        old = scale[:, :, group]
        new = torch.where((denominator > 1e-20) & (old + step > 0), old + step, old)
        residual -= torch.bmm(own * (new - old).unsqueeze(2), rows)
        scale[:, :, group] = new
    return scale, residual


def _rescale(centred: Tensor, pull: Tensor, residual: Tensor, scale: Tensor) -> Tensor:
    """As :func:`_best_scales` for one scale a channel, of whose residual, changed in place, the products are known."""
    through = pull - residual  # times the scale so far
    denominator = (through * centred).sum(2, keepdim=True) / scale
    best = (centred * pull).sum(2, keepdim=True) / denominator.clamp(min=1e-20)
    best = torch.where((denominator > 1e-20) & (best > 0), best, scale)
    residual.addcmul_(through, 1.0 - best / scale)
    return best


def _descend(
    q: Tensor,
    target: Tensor,
    h: Tensor,
    scale: Tensor,
    zero: Tensor,
    low: int,
    high: int,
    sweeps: int,
    modulation: Tensor | None,
    neighbours: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Step 3; ``q`` and ``scale`` improved."""
    hf, diagonal = h.float(), h.diagonal(dim1=1, dim2=2).float()
    q, target, scale = q.clone(), target.float(), scale.float()
    pull = torch.bmm(target, hf)  # (G, R, K): H w*
    z = _by_column(zero.float(), q.shape[2])
    beside = list(range(q.shape[2])) if neighbours is None else neighbours.tolist()
    carried = q.shape[2] >= _WIDE and q.shape[0] == scale.shape[2] == 1
    residual: Tensor | None = None
    for _ in range(sweeps):
        centred = _times(q - z, modulation)
        if residual is None or not carried:
            scale, residual = _best_scales(centred, pull, hf, scale)
        else:
            scale = _rescale(centred, pull, residual, scale)
        s = _times(_by_column(scale, q.shape[2]), modulation)
        before = q.clone()
        for start in range(0, q.shape[2], _BLOCK):
            end = min(start + _BLOCK, q.shape[2])
            local = hf[:, start:end, start:end]
            block, q_b, s_b = (_columns_first(values[:, :, start:end]) for values in (residual, q, s))
            moved = torch.empty_like(block)
            for j in range(end - start):
                step = block[:, j] / (diagonal[:, start + j].unsqueeze(1) * s_b[:, j])
                new = (q_b[:, j] + step).round_().clamp_(low, high)
                if beside[start + j] != start + j:
                    _beside_(new, q[:, :, beside[start + j]])
                moved[:, j] = (new - q_b[:, j]) * s_b[:, j]
                q[:, :, start + j] = new
                block[:, j + 1 :] -= moved[:, j].unsqueeze(1) * local[:, j, j + 1 :].unsqueeze(2)
            if carried:  # of some sweeps most rows of a block are left as they were
                rows = moved[0].any(0).nonzero().squeeze(1)
                residual[0].index_add_(0, rows, moved[0, :, rows].T @ hf[0, start:end], alpha=-1)
            else:  # of what lies before the block nobody reads the residual in this sweep, and the next begins with its own
                residual[:, :, end:] -= torch.bmm(moved.transpose(1, 2), hf[:, start:end, end:])
        if torch.equal(before, q):
            break
    return q, scale


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
        (K,) inputs whose integers are kept from exceeding :data:`~cat_plugin.ptq.quantizers.pairs.LIMIT` together; only where
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
    q = _spread_rounding(targets, h, scales, zeros, low, high, many_m, neighbours)
    tried = sweeps if trial is None else min(trial, sweeps)
    q, scales = _descend(q, targets, h, scales, zeros, low, high, tried, many_m, neighbours)
    error = _times((q - _by_column(zeros, k)) * _by_column(scales, k), many_m) - targets.float()
    losses = (torch.bmm(error, h.float()) * error).sum(2).reshape(g, many, r)
    pick = losses.argmin(1, keepdim=True)
    q = q.reshape(g, many, r, k).gather(1, pick.unsqueeze(3).expand(g, 1, r, k)).squeeze(1)
    scales = scales.reshape(g, many, r, -1)
    chosen = scales.gather(1, pick.unsqueeze(3).expand(g, 1, r, scales.shape[3])).squeeze(1)
    if tried < sweeps:
        zeros = zero_point.reshape(g, r, -1)
        q, chosen = _descend(q, target, h, chosen, zeros, low, high, sweeps - tried, modulation, neighbours)
    return q.to(torch.int8), chosen.reshape(scale.shape)
