"""One pass of optimal-brain rounding, column by column, each column's error taken up by those still free.

Frantar et al., "GPTQ", arXiv 2210.17323, equations 2 and 3, with one factorisation and no inverse: with ``H = V V'``, V upper
triangular, the error of a row is ``sum_j (sum_{i <= j} V_ij e_i)^2``, ``e`` being what it is off its target.  Columns behind
can bring their own terms to 0, so column j is rounded where its term is least: at its target plus
``sum_{i < j} V_ij e_i / V_jj``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cat_plugin.ptq.closed_form.grids import SMALL_BLOCK, beside_, by_column, columns_first, times
from cat_plugin.ptq.quantizers.neighbours import bounded

__all__ = ["spread_rounding"]

_ATTEMPTS = 8  # at a factorisation, with more ridge each time
_BLOCK = 128  # columns whose errors are gathered before they are spread over the rest by one matrix product


def _shares(h: Tensor) -> Tensor:
    """(G, K, K) ``V_ij / V_jj`` of each matrix, with as much ridge as rounding errors ask for.

    What cannot be factored with any (it holds NaN or infinities) gets the identity: rounding to nearest.
    """
    reverse = h.flip(1, 2)
    mean = h.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12).unsqueeze(1)
    ridge = 1e-9
    for _ in range(_ATTEMPTS):
        reverse.diagonal(dim1=1, dim2=2).add_(mean * ridge)
        factor, failed = torch.linalg.cholesky_ex(reverse)
        if not bool(failed.any()) and bool(torch.isfinite(factor).all()):
            upper: Tensor = factor.float().flip(1, 2)
            return upper / upper.diagonal(dim1=1, dim2=2).unsqueeze(1)
        ridge *= 100
    return torch.eye(h.shape[1], device=h.device).expand(h.shape)


def spread_rounding(
    target: Tensor,
    h: Tensor,
    scale: Tensor,
    zero: Tensor,
    low: int,
    high: int,
    modulation: Tensor | None,
    neighbours: Tensor | None,
) -> Tensor:
    """Round every row to its grid.

    Parameters
    ----------
    target : Tensor
        (G, R, K) weights.
    h : Tensor
        (G, K, K) float64 covariance of the inputs, damped.
    scale, zero : Tensor
        (G, R, Q) grids.
    low, high : int
        Least and greatest integer.
    modulation : Tensor or None
        (G, R, K) what the steps are multiplied by.
    neighbours : Tensor or None
        (K, n) whose integers bound each other.

    Returns
    -------
    Tensor
        (G, R, K) integers as float32.
    """
    g, _, k = target.shape
    order = h.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    index = order.unsqueeze(1).expand_as(target)
    groups = torch.arange(g, device=h.device).reshape(-1, 1, 1)
    shares = _shares(h[groups, order.unsqueeze(2), order.unsqueeze(1)])
    wanted = columns_first(target.gather(2, index).float())
    work, integers = wanted.clone(), torch.empty_like(wanted)
    s, z = (by_column(values.float(), k, order) for values in (scale, zero))
    if modulation is not None:
        s = s * modulation.gather(2, index)
    if neighbours is not None:
        # of several, the integers that are not chosen yet are taken to be near their targets
        beside = order.argsort(1)[groups, neighbours[order]]
        free = beside == torch.arange(k, device=h.device).unsqueeze(1)
        steps = times(by_column(scale.float(), k), modulation)
        near = bounded((target.float() / steps).round_().clamp_(low, high), neighbours)
        integers.copy_(near.gather(2, index).transpose(1, 2))
    for start in range(0, k, _BLOCK):
        end = min(start + _BLOCK, k)
        s_b, z_b = (columns_first(values[:, :, start:end]) for values in (s, z))
        errors = torch.empty_like(s_b)
        for first in range(start, end, SMALL_BLOCK):
            last = min(first + SMALL_BLOCK, end)
            for j in range(first, last):
                step, centre, q = s_b[:, j - start], z_b[:, j - start], integers[:, j]
                new = (work[:, j] / step).add_(centre).round_().clamp_(low, high)
                if neighbours is not None:
                    others = integers.gather(1, beside[:, j].unsqueeze(2).expand(-1, -1, new.shape[1]))
                    beside_(new, others.masked_fill_(free[:, j].unsqueeze(2), 0.0).unbind(1))
                q.copy_(new)
                error = torch.sub(wanted[:, j], new.sub_(centre).mul_(step), out=errors[:, j - start])
                if j + 1 < last:
                    work[:, j + 1 : last].addcmul_(
                        shares[:, j, j + 1 : last].unsqueeze(2), error.unsqueeze(1)
                    )
            there = shares[:, first:last, last:end].transpose(1, 2)
            work[:, last:end].baddbmm_(there, errors[:, first - start : last - start])
        work[:, end:].baddbmm_(shares[:, start:end, end:].transpose(1, 2), errors)
    back = order.argsort(1).unsqueeze(2).expand_as(integers)
    return columns_first(integers.gather(1, back))
