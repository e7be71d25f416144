"""Learned activation steps with random dropping, as one differentiable operation.

The forward pass is the quantizer's; backward, rounding counts as the identity (straight-through), so that the step
``s`` gets ``d x_hat / d s = q - x/s`` inside the range and ``q`` outside (Esser et al., "Learned Step Size
Quantization", arXiv 1902.08153, equation 3).  Dropping leaves each element unquantized with a given probability while
the unit is trained (Wei et al., "QDrop", arXiv 2203.05740, equation 7), which flattens the loss around the solution.
Default: steps are learned, nothing is dropped: after the closed form it brought nothing (docs/ptq.md).

Written with operations that torch vectorises on every CPU (clamp, round, lerp, the backward of hardtanh); masks are
float factors, because comparisons and selections by booleans are an order of magnitude slower there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cat_plugin.ptq.quantizers.per_token import TokenQuantizer
from cat_plugin.ptq.quantizers.uniform import ActQuantizer

__all__ = ["DropMask", "SoftActivation", "quantize_with_step"]

_inside = torch.ops.aten.hardtanh_backward.default


class _StepQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: float, high: float, keep: Tensor | None) -> Tensor:
        ratio = x * (1.0 / scale)
        q = ratio.clamp(low, high).round_()
        ctx.save_for_backward(ratio, q, keep)
        ctx.bounds = (low - 0.5, high + 0.5)
        out = q * scale
        return out if keep is None else torch.lerp(x, out, keep)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (grad,) = grads
        ratio, q, keep = ctx.saved_tensors
        kept = grad if keep is None else grad * keep
        through = _inside(kept, ratio, *ctx.bounds)
        to_scale = torch.sum(kept * q) - torch.sum(through * ratio)
        to_input = through if keep is None else (through + grad).sub_(kept)
        return to_input, to_scale, None, None, None


def quantize_with_step(
    x: Tensor, scale: Tensor, zero_point: int, qmin: int, qmax: int, keep: Tensor | None = None
) -> Tensor:
    """Fake-quantize with gradients for the input and the step.

    Parameters
    ----------
    x : Tensor
        Any shape.
    scale : Tensor
        () positive.
    zero_point, qmin, qmax : int
        The grid.
    keep : Tensor or None
        Of the shape of ``x``: 1 where the quantized value is used, 0 where ``x`` passes; None is all ones.

    Returns
    -------
    Tensor
        Of the shape of ``x``.
    """
    low, high = float(qmin - zero_point), float(qmax - zero_point)
    out: Tensor = _StepQuantize.apply(x, scale, low, high, keep)  # type: ignore[no-untyped-call]
    return out


class DropMask:
    """Cheap random masks: one long strip of zeros and ones, read from a random place.

    Parameters
    ----------
    probability : float
        Share of elements left unquantized.
    generator : torch.Generator
        CPU generator.
    device : torch.device
        Where the masks are needed.
    """

    def __init__(self, probability: float, generator: torch.Generator, device: torch.device) -> None:
        self.probability, self.generator, self.device = probability, generator, device
        self.strip = torch.empty(0)

    def like(self, x: Tensor) -> Tensor | None:
        """Mask with the shape and memory layout of ``x``; None when nothing is dropped."""
        if self.probability <= 0:
            return None
        slack = 4099
        if self.strip.numel() < x.numel() + slack:
            draws = torch.rand(x.numel() + slack, generator=self.generator)
            self.strip = (draws >= self.probability).float().to(self.device)
        start = int(torch.randint(slack, (1,), generator=self.generator))
        return torch.as_strided(self.strip, x.shape, x.stride(), start) if x.numel() else None


class SoftActivation:
    """The step of one activation quantizer while it is learned (in the logarithm, so that it stays positive)."""

    def __init__(self, quantizer: ActQuantizer) -> None:
        self.quantizer = quantizer
        self.log_scale = quantizer.scale.detach().log().requires_grad_()

    def __call__(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Fake-quantize ``x``."""
        scale = self.log_scale.exp()
        if isinstance(self.quantizer, TokenQuantizer):
            out = self.quantizer.rounded(x, scale)
            return out if keep is None else torch.lerp(x, out, keep)
        return quantize_with_step(x, scale, self.quantizer.zero_point, *self.quantizer.qrange, keep)

    def harden(self) -> None:
        """Write the step into the quantizer."""
        self.quantizer.scale.copy_(self.log_scale.detach().exp())
