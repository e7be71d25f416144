"""Grids of any levels, for the result of a softmax.

At run time a value is compared with the borders between levels and its level is read from a table, which asks nothing of them.
:class:`FittedQuantizer` has those of least squared error for the values that calibration shows (S. P. Lloyd, "Least squares
quantization in PCM", IEEE Transactions on Information Theory 28, 1982, method I), but for the first, which is zero: what a
mask leaves out stays out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cat_plugin.ptq.quantizers.uniform import ActQuantizer

__all__ = ["FittedQuantizer", "TableQuantizer", "borders_of", "fit_levels"]

_ROUNDS = 200
_SETTLED = 1e-5  # share of the error that a round gains when it was the last


class TableQuantizer(ActQuantizer):
    """Static quantizer of values from zero on, to the nearest of some levels."""

    @property
    def levels(self) -> Tensor:
        """(2**bits,) float32 values that there are, ascending from zero."""
        raise NotImplementedError

    @property
    def borders(self) -> Tensor:
        """(2**bits - 1,) float32 values from which on the next level is the nearest."""
        return borders_of(self.levels)

    def forward(self, x: Tensor) -> Tensor:
        """The levels nearest to ``x`` (any shape); while gradients are taken, rounding is the identity to them."""
        if not self.ready:
            return x
        rounded = self.levels[torch.bucketize(x.detach(), self.borders, right=True)]
        return x + (rounded - x).detach() if torch.is_grad_enabled() and x.requires_grad else rounded


class FittedQuantizer(TableQuantizer):
    """Static quantizer whose levels are given one by one.

    Attributes
    ----------
    table : Tensor
        (2**bits,) float32 levels, ascending from zero.
    """

    table: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.register_buffer("table", torch.zeros(2**bits))

    @property
    def levels(self) -> Tensor:
        """(2**bits,) float32 values that there are, ascending from zero."""
        return self.table

    def set_levels(self, levels: Tensor) -> None:
        """Fix the (2**bits,) levels; from here on the quantizer acts."""
        self.table.copy_(levels)
        self.set_range(float(levels[-1]), 0, False)


def borders_of(levels: Tensor) -> Tensor:
    """(L - 1,) values from which on the next of (L,) ascending levels is the nearest."""
    return (levels[1:] + levels[:-1]) / 2


def fit_levels(values: Tensor, start: Tensor) -> Tensor:
    """Levels of least squared error for a sample, the first of them zero.

    Parameters
    ----------
    values : Tensor
        (n,) float sample, none negative.
    start : Tensor
        (L,) ascending levels to begin with; the error of the result is no greater than theirs.

    Returns
    -------
    Tensor
        (L,) float32, ascending from zero. Each but the first is the mean of the values that are nearest to it.
    """
    ordered = values.double().flatten().sort().values
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    levels, least = start.to(ordered), torch.inf
    for _ in range(_ROUNDS):
        ends = torch.searchsorted(ordered, borders_of(levels))
        ends = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(ordered))])
        counts, totals = ends.diff(), sums[ends].diff()
        error = float((counts * levels.square() - 2 * totals * levels).sum() + ordered.square().sum())
        if error >= least * (1 - _SETTLED):
            break
        least = error
        levels = torch.where(counts > 0, totals / counts.clamp(min=1), levels)
        levels[0] = 0.0
    return levels.float()
