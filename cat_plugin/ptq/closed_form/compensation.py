"""Error-compensated rounding in closed form: the integers that reproduce a layer's outputs, without gradients.

For one output channel the mean squared output error of integers ``q`` on the grid ``(s, z)`` is, up to a constant,
``(s (q - z) - w*)' H (s (q - z) - w*)`` with ``H`` the covariance of the layer's quantized inputs and ``w*`` the
least-squares weight that maps these inputs to the full-precision outputs.  Three steps bring it down:

1. ``w*`` by ridge regression towards the trained weight (it takes up what quantized inputs have done already), the ridge
   chosen by fitting one half of the calibration batches and judging on the other;
2. one pass of optimal-brain rounding, column by column, each column's error spread over those still free (Frantar et
   al., "GPTQ", arXiv 2210.17323, equations 2 and 3, after "Optimal Brain Compression", arXiv 2208.11580);
3. sweeps of cyclic coordinate descent over the integers, alternating with the closed-form scale
   ``s = (q - z)' H w* / (q - z)' H (q - z)`` (Zhang et al., "COMQ", arXiv 2403.07134, section 3).

Several starting scales are carried along as extra rows and the best is kept for each channel.  The bias is the mean
that is left (:mod:`cat_plugin.ptq.closed_form.bias_correction`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cat_plugin.ptq.closed_form.moments import Moments

__all__ = ["fit_integers", "least_squares_weight", "ridge_by_halves"]

_ATTEMPTS = 8  # at a factorisation, with more ridge each time
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


def _spread_rounding(target: Tensor, h: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """Step 2 for (G, R, K) targets; returns the integers as floats."""
    g, _, k = target.shape
    order = h.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    index = order.unsqueeze(1).expand_as(target)
    rows = torch.arange(g, device=h.device).reshape(-1, 1, 1)
    permuted = h[rows, order.unsqueeze(2), order.unsqueeze(1)]
    upper = _inverse_factor(permuted)
    work = target.gather(2, index).float().clone()
    integers = torch.empty_like(work)
    s, z = scale.float(), zero.float()
    for start in range(0, k, _BLOCK):
        end = min(start + _BLOCK, k)
        block = work[:, :, start:end].clone()
        errors = torch.empty_like(block)
        for j in range(end - start):
            column, row = block[:, :, j], upper[:, start + j, start:end]
            q = (column / s + z).round_().clamp_(low, high)
            integers[:, :, start + j] = q
            errors[:, :, j] = (column - (q - z) * s) / row[:, j].unsqueeze(1)
            block[:, :, j + 1 :] -= errors[:, :, j].unsqueeze(2) * row[:, j + 1 :].unsqueeze(1)
        work[:, :, end:] -= torch.bmm(errors, upper[:, start:end, end:])
    return torch.empty_like(integers).scatter_(2, index, integers)


def _descend(
    q: Tensor, target: Tensor, h: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, sweeps: int
) -> tuple[Tensor, Tensor]:
    """Step 3; ``q`` and ``scale`` improved."""
    hf, diagonal = h.float(), h.diagonal(dim1=1, dim2=2).float()
    q, target, scale = q.clone(), target.float(), scale.float()
    pull = torch.bmm(target, hf)  # (G, R, K): H w*
    z = zero.float()
    for _ in range(sweeps):
        centred = q - z.unsqueeze(2)
        through = torch.bmm(centred, hf)
        denominator = (through * centred).sum(2)
        best = (centred * pull).sum(2) / denominator.clamp(min=1e-20)
        scale = torch.where((denominator > 1e-20) & (best > 0), best, scale)
        residual = pull - through * scale.unsqueeze(2)  # H (w* - w)
        before = q.clone()
        for start in range(0, q.shape[2], _BLOCK):
            end = min(start + _BLOCK, q.shape[2])
            block, local = residual[:, :, start:end].clone(), hf[:, start:end, start:end]
            moved = torch.empty_like(block)
            for j in range(end - start):
                column = q[:, :, start + j]
                step = block[:, :, j] / (diagonal[:, start + j].unsqueeze(1) * scale)
                new = (column + step).round_().clamp_(low, high)
                moved[:, :, j] = (new - column) * scale
                q[:, :, start + j] = new
                block -= moved[:, :, j].unsqueeze(2) * local[:, j].unsqueeze(1)
            residual -= torch.bmm(moved, hf[:, start:end])
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
) -> tuple[Tensor, Tensor]:
    """Integers and scales of least output error.

    Parameters
    ----------
    target : Tensor
        (G, R, K) weight to reproduce, from :func:`least_squares_weight`.
    moments : Moments
        Of the quantized inputs.
    scale, zero_point : Tensor
        (G, R) initial grid; the zero point stays.
    qrange : tuple of int
        Least and greatest integer.
    damping : float
        Added to the covariance's diagonal, as a share of its mean.
    sweeps : int
        Passes of coordinate descent.
    factors : tuple of float
        Starting scales tried, as multiples of ``scale``.

    Returns
    -------
    integers : Tensor
        (G, R, K) int8.
    scale : Tensor
        (G, R) float32.
    """
    low, high = qrange
    g, r, k = target.shape
    h = moments.h.clone()
    mean = h.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    h += torch.eye(k, dtype=h.dtype, device=h.device) * (damping * mean).reshape(-1, 1, 1)
    many = len(factors)
    factor = torch.tensor(factors, device=scale.device, dtype=torch.float32).reshape(1, many, 1)
    scales = (scale.float().unsqueeze(1) * factor).reshape(g, many * r)
    zeros = zero_point.unsqueeze(1).expand(g, many, r).reshape(g, many * r)
    targets = target.unsqueeze(1).expand(g, many, r, k).reshape(g, many * r, k)
    q = _spread_rounding(targets, h, scales, zeros, low, high)
    q, scales = _descend(q, targets, h, scales, zeros, low, high, sweeps)
    error = (q - zeros.unsqueeze(2)) * scales.unsqueeze(2) - targets.float()
    losses = (torch.bmm(error, h.float()) * error).sum(2).reshape(g, many, r)
    pick = losses.argmin(1, keepdim=True)
    q = q.reshape(g, many, r, k).gather(1, pick.unsqueeze(3).expand(g, 1, r, k)).squeeze(1)
    return q.to(torch.int8), scales.reshape(g, many, r).gather(1, pick).squeeze(1)
