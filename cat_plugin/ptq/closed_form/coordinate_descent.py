"""Sweeps of cyclic coordinate descent over a layer's integers, alternating with the scale of least error.

Zhang et al., "COMQ", arXiv 2403.07134, section 3.  Columns change each other one by one within a few, these the rest of a block by
a matrix product, and a block what lies outside it by another.  Few integers move in a sweep, so that what a block has moved is a
sparse matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cat_plugin.ptq.closed_form.grids import SMALL_BLOCK, beside_, by_column, columns_first, times

__all__ = ["descend"]

_WIDE = 512  # inputs from which on a residual goes from sweep to sweep, as exact as float32 adds up, and is not computed anew
_BLOCK = 256  # columns whose moves are gathered before they reach the rest


def _best_scales(centred: Tensor, pull: Tensor, hf: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(G, R, Q) scales of least error for (G, R, K) integers less zero point, and the residual ``H (w* - w)``."""
    groups, width = scale.shape[2], centred.shape[2] // scale.shape[2]
    if groups == 1:
        through = torch.bmm(centred, hf)
        denominator = (through * centred).sum(2, keepdim=True)
        best = (centred * pull).sum(2, keepdim=True) / denominator.clamp(min=1e-20)
        scale = torch.where((denominator > 1e-20) & (best > 0), best, scale)
        return scale, pull - through * scale
    residual = pull - torch.bmm(centred * by_column(scale, centred.shape[2]), hf)
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


def descend(
    q: Tensor,
    pull: Tensor,
    hf: Tensor,
    scale: Tensor,
    zero: Tensor,
    low: int,
    high: int,
    sweeps: int,
    modulation: Tensor | None,
    neighbours: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Improve integers and scales.

    Parameters
    ----------
    q : Tensor
        (G, R, K) integers as float32, left unchanged.
    pull : Tensor
        (G, R, K) float32 product of the target weights and ``hf``.
    hf : Tensor
        (G, K, K) float32 covariance of the inputs, damped.
    scale, zero : Tensor
        (G, R, Q) grids.
    low, high : int
        Least and greatest integer.
    sweeps : int
        Passes over all columns at most.
    modulation : Tensor or None
        (G, R, K) what the steps are multiplied by.
    neighbours : Tensor or None
        (K, n) whose integers bound each other.

    Returns
    -------
    q, scale : Tensor
        The better ones, of the shapes given.
    residual : Tensor or None
        (G, R, K) ``H (w* - w)`` of these; None where it is not carried along.
    """
    k = q.shape[2]
    q, scale = q.clone(), scale.float()
    z = by_column(zero.float(), k)
    beside = None
    if neighbours is not None:
        beside = [[other for other in others if other != j] for j, others in enumerate(neighbours.tolist())]
    carried = k >= _WIDE and q.shape[0] == scale.shape[2] == 1
    residual: Tensor | None = None
    for _ in range(sweeps):
        centred = times(q - z, modulation)
        if residual is None or not carried:
            scale, residual = _best_scales(centred, pull, hf, scale)
        else:
            scale = _rescale(centred, pull, residual, scale)
        s = times(by_column(scale, k), modulation)
        changed = False
        for start in range(0, k, _BLOCK):
            end = min(start + _BLOCK, k)
            new, moved = _block(q, residual, hf, s, start, end, low, high, beside)
            changed = changed or bool(moved.any())
            q[:, :, start:end] = new.transpose(1, 2)
            if carried:
                residual[0].addmm_(moved[0].T.to_sparse(), hf[0, start:end], alpha=-1)
            else:  # of what lies before the block nobody reads the residual in this sweep, and the next begins with its own
                residual[:, :, end:].baddbmm_(moved.transpose(1, 2), hf[:, start:end, end:], alpha=-1)
        if not changed:
            break
    return q, scale, residual if carried else None


def _block(
    q: Tensor,
    residual: Tensor,
    hf: Tensor,
    s: Tensor,
    start: int,
    end: int,
    low: int,
    high: int,
    beside: list[list[int]] | None,
) -> tuple[Tensor, Tensor]:
    """(G, C, R) new integers of the columns from `start` to `end`, and what they have moved the weights by."""
    local, diagonal = hf[:, start:end, start:end], hf[:, start:end, start:end].diagonal(dim1=1, dim2=2)
    rest, old, steps = (columns_first(values[:, :, start:end]) for values in (residual, q, s))
    reach = (diagonal.unsqueeze(2) * steps).reciprocal_()
    new, moved = torch.empty_like(old), torch.empty_like(old)
    width = end - start
    for first in range(0, width, SMALL_BLOCK):
        last = min(first + SMALL_BLOCK, width)
        for j in range(first, last):
            best, move = new[:, j], moved[:, j]
            torch.addcmul(old[:, j], rest[:, j], reach[:, j], out=best)
            best.round_().clamp_(low, high)
            if beside is not None and beside[start + j]:
                places = [other - start for other in beside[start + j]]
                inside = [
                    (new if p < j else old)[:, p] if 0 <= p < width else q[:, :, start + p] for p in places
                ]
                beside_(best, inside)
            torch.sub(best, old[:, j], out=move).mul_(steps[:, j])
            if j + 1 < last:
                across = local[:, j + 1 : last, j].unsqueeze(2)
                rest[:, j + 1 : last].addcmul_(across, move.unsqueeze(1), value=-1)
        rest[:, last:].baddbmm_(local[:, last:, first:last], moved[:, first:last], alpha=-1)
    return new, moved
