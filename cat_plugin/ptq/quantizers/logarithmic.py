"""A grid whose steps grow with the value, for the result of a softmax: most shares are tiny, and few are near one.

The levels are ``0`` and ``s b**-k``, ``k = 0..2**bits - 2``, and a value goes to the nearest.  With ``b = 2`` this is the
logarithmic quantizer of softmax (Lin et al., "FQ-ViT", arXiv 2111.13824, equation 13), with ``sqrt(2)`` that of RepQ-ViT
(arXiv 2212.08254, section 3.4); here the base is searched with the scale (Wu et al., "AdaLog", arXiv 2407.12951, section 3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cat_plugin.ptq.quantizers.tables import TableQuantizer, borders_of

__all__ = ["LogQuantizer", "search_levels"]

_STEPS = 16  # of the base: its logarithm to base 2 is a whole number of sixteenths


class LogQuantizer(TableQuantizer):
    """Static logarithmic quantizer of values from zero on.

    Attributes
    ----------
    scale : Tensor
        () the greatest level.
    zero_point : int
        16 times the logarithm to base 2 of the ratio of two levels.
    """

    @property
    def levels(self) -> Tensor:
        """(2**bits,) float32 values that there are, ascending from zero."""
        return _levels(self.scale, self.zero_point, self.bits)


def _levels(scale: Tensor, step: int, bits: int) -> Tensor:
    exponents = torch.arange(2**bits - 2, -1, -1, dtype=torch.float64, device=scale.device)
    powers = scale.double() * torch.exp2(-exponents * (step / _STEPS))
    return torch.cat([powers.new_zeros(1), powers]).float()


def search_levels(values: Tensor, bits: int) -> tuple[float, int, bool]:
    """Scale and base of least squared error for a sample of a softmax's result.

    Parameters
    ----------
    values : Tensor
        (n,) float sample, none negative.
    bits : int
        2..8.

    Returns
    -------
    scale, step, signed
        What :meth:`LogQuantizer.set_range` takes; never signed.
    """
    high = values.max().clamp(min=1e-8)
    best = (float("inf"), 1.0, _STEPS)
    lowest = max(1, round(_STEPS * 4 / 2**bits))
    for step in sorted({max(lowest, round(lowest * 1.25**k)) for k in range(13)}):
        for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4):
            levels = _levels(share * high, step, bits)
            rounded = levels[torch.bucketize(values, borders_of(levels), right=True)]
            error = float((rounded - values).square().mean())
            if error < best[0]:
                best = (error, float(share * high), step)
    return best[1], best[2], False
