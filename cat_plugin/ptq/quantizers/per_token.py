"""Dynamic quantizer whose grid is each token's own: no range is stored, and no token suffers from another's outliers.

With ``l`` and ``h`` the least and greatest value of a token (its last axis), 0 included, and ``c`` a share of the range,
``s = c (h - l) / (2^b - 1)``, ``z = round(-c l / s)``, ``x_int = clamp(round(x / s + z), 0, 2^b - 1)`` and
``x_hat = (x_int - z) s`` (Yao et al., "ZeroQuant", arXiv 2206.01861, section 3.1; a share below one clips, which pays at 4
bits: Ashkboos et al., "QuaRot", arXiv 2404.00456, section 4.2, where it is 0.9 throughout).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cat_plugin.ptq.quantizers.uniform import ActQuantizer

__all__ = ["LEAST_SCALE", "TokenQuantizer", "token_grid"]

LEAST_SCALE = 1e-8
"""No token's scale is smaller."""


def token_grid(x: Tensor, share: Tensor | float, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point (float) of each token.

    Parameters
    ----------
    x : Tensor
        (..., C) float.
    share : Tensor or float
        Of the range that is kept.
    bits : int
        2..8.

    Returns
    -------
    scale, zero_point : Tensor
        (..., 1) float; zero points are whole numbers of 0 .. 2^bits - 1.
    """
    low = x.amin(-1, keepdim=True).clamp(max=0.0) * share
    high = x.amax(-1, keepdim=True).clamp(min=0.0) * share
    scale = ((high - low) * (1.0 / ((1 << bits) - 1))).clamp(min=LEAST_SCALE)
    return scale, torch.round(-low / scale)


class TokenQuantizer(ActQuantizer):
    """Dynamic per-token quantizer of an activation.

    Parameters
    ----------
    bits : int
        2..8.

    Attributes
    ----------
    scale : Tensor
        () float32 share of each token's range.
    """

    def set_range(self, scale: float, zero_point: int = 0, signed: bool = False) -> None:
        """Fix the share; from here on the quantizer acts."""
        super().set_range(scale, 0, False)

    def rounded(self, x: Tensor, share: Tensor | float) -> Tensor:
        """Fake-quantize ``x`` with another share; gradients pass the rounding as if it were the identity."""
        scale, zero = token_grid(x, share, self.bits)
        ratio = x * (1.0 / scale)
        if torch.is_grad_enabled():
            zero = zero.detach()
            integers = torch.clamp(ratio + (torch.round(ratio + zero) - ratio).detach(), *self.qrange)
        else:
            integers = torch.clamp(torch.round(ratio + zero), *self.qrange)
        return (integers - zero) * scale

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize ``x`` (..., C), bit for bit what the QDQ operations of the exported graph compute."""
        if not self.ready:
            return x
        with torch.no_grad():
            return self.rounded(x, float(self.scale))
