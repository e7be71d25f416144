"""Rounding that gradients pass through, with ranges that are trained."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["between", "clipped_weight"]


def _rounded(x: Tensor) -> Tensor:
    """Rounded to nearest, with the gradient of the identity."""
    return x + (x.round() - x).detach()


def between(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """``x`` on a uniform grid over a range, with an integer that stands for zero.

    Parameters
    ----------
    x : Tensor
        (...) values.
    low, high : Tensor
        Ends, which broadcast with ``x``; the range is extended to hold zero.
    bits : int
        2..8.

    Returns
    -------
    Tensor
        Like ``x``, differentiable in all three.
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    top = 2**bits - 1
    scale = ((high - low) / top).clamp(min=1e-8)
    zero = _rounded(-low / scale)
    integers = torch.clamp(_rounded(x / scale) + zero, 0, top)
    return torch.mul(integers - zero, scale)


def clipped_weight(
    weight: Tensor, low_share: Tensor, high_share: Tensor, bits: int, factor: Tensor | None = None
) -> Tensor:
    """(O, I) weight rounded to a grid for each row, or each of Q groups of its columns, over shares of its extremes.

    ``low_share`` and ``high_share`` are (O Q, 1) logits: a share is their sigmoid (OmniQuant, arXiv 2308.13137, equation 2).
    Steps are multiplied by an (O, I) factor, if there is one.
    """
    if factor is not None:
        weight = weight / factor
    rows = weight.reshape(len(low_share), -1)
    low = torch.sigmoid(low_share) * rows.amin(1, keepdim=True)
    high = torch.sigmoid(high_share) * rows.amax(1, keepdim=True)
    rounded = between(rows, low, high, bits).reshape(weight.shape)
    return rounded if factor is None else rounded * factor
