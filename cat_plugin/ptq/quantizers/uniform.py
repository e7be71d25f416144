"""Uniform quantizers as modules: one tensor's grid, with what is learned of it.

``x_int = clamp(round(x / s) + z, qmin, qmax)`` and ``x_hat = (x_int - z) s``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ActQuantizer", "integer_range"]


def integer_range(bits: int, signed: bool) -> tuple[int, int]:
    """Least and greatest integer of ``bits`` bits.

    Returns
    -------
    tuple of int
        ``(-2**(bits-1), 2**(bits-1) - 1)`` if signed, else ``(0, 2**bits - 1)``.
    """
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


class ActQuantizer(nn.Module):
    """Static per-tensor quantizer of an activation.

    Parameters
    ----------
    bits : int
        2..8.

    Attributes
    ----------
    scale : Tensor
        () float32.
    zero_point : int
        Integer that stands for 0.
    signed : bool
        int8 storage if True, uint8 otherwise; chosen from the data.
    ready : bool
        False before calibration: the input passes through unchanged.
    """

    scale: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.signed = False
        self.zero_point = 0
        self.ready = False
        self.register_buffer("scale", torch.ones(()))

    @property
    def qrange(self) -> tuple[int, int]:
        """Least and greatest integer."""
        return integer_range(self.bits, self.signed)

    def set_range(self, scale: float, zero_point: int, signed: bool) -> None:
        """Fix the grid; from here on the quantizer acts."""
        self.scale.fill_(scale)
        self.zero_point, self.signed, self.ready = int(zero_point), signed, True

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize ``x`` (any shape), bit for bit what the QDQ pair of the exported graph computes."""
        if not self.ready:
            return x
        qmin, qmax = self.qrange
        scale = float(self.scale)
        q = torch.clamp(torch.round(x * (1.0 / scale)) + self.zero_point, qmin, qmax)
        return (q - self.zero_point) * scale
