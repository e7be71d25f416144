"""Learned rounding of a layer's weights, in two forms.

``adaround``: ``q = floor(v) + h(V)`` with the rectified sigmoid ``h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)`` and the
regulariser ``sum 1 - |2 h(V) - 1|^beta``, whose ``beta`` falls while training until every ``h`` is 0 or 1 (Nagel et
al., "Up or Down?", arXiv 2004.10568, equations 23 and 24).  A weight moves to one of two neighbours.

``straight_through``: ``q = round(u)`` with the gradient passed through the rounding (Bengio et al., arXiv 1308.3432;
Esser et al., arXiv 1902.08153).  A weight may move further, and the loss is at all times that of integers, so that
training may stop anywhere.

Both start from integers given (those of the closed form), at the real-valued weight's side of the cell.  The weight's
scale and the bias are learned with it.  Default: ``straight_through``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cat_plugin.ptq.graph.modules import QuantOp

__all__ = ["SoftLayer", "round_through"]

_inside = torch.ops.aten.hardtanh_backward.default
_STRETCH = 1.2
_SHIFT = 0.1


class _RoundClamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(u)
        ctx.bounds = (low - 0.5, high + 0.5)
        return u.clamp(low, high).round_()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (u,) = ctx.saved_tensors
        return _inside(grads[0], u, *ctx.bounds), None, None


def round_through(u: Tensor, low: float, high: float) -> Tensor:
    """Round and clamp to [low, high]; the gradient passes where ``u`` is inside."""
    out: Tensor = _RoundClamp.apply(u, float(low), float(high))  # type: ignore[no-untyped-call]
    return out


def _rectified_sigmoid(v: Tensor) -> Tensor:
    return (torch.sigmoid(v) * _STRETCH - _SHIFT).clamp(0.0, 1.0)


class SoftLayer:
    """What is learned of one layer.

    Parameters
    ----------
    layer : QuantOp
        With integers chosen.
    method : {"straight_through", "adaround"}
        How the rounding is relaxed.
    margin : float
        How near to the cell's border a latent weight may start; 0.5 is the border.

    Attributes
    ----------
    latent : Tensor
        Weight in units of the grid, or the ``V`` of AdaRound.
    log_scale : Tensor
        (O,) logarithm of the weight's scale.
    bias : Tensor or None
        (O,).
    """

    def __init__(self, layer: QuantOp, method: str, margin: float = 0.4) -> None:
        if layer.q_weight is None:
            raise ValueError(f"layer {layer.name} has no integers to start from")
        self.layer, self.method = layer, method
        low, high = layer.qrange
        q = layer.q_weight.float()
        self.zero = layer.per_channel(layer.zero_point).float()
        self.log_scale = layer.scale.detach().log().requires_grad_()
        self.bias = None if layer.bias is None else layer.bias.detach().clone().requires_grad_()
        grid = layer.weight / layer.per_channel(layer.scale) + self.zero
        if method == "adaround":
            self.floor = torch.where(grid >= q, q, q - 1).clamp(low, high - 1)
            soft = 0.7 * (q - self.floor) + 0.3 * (grid - self.floor).clamp(0, 1)
            soft = soft.clamp(0.05, 0.95)
            self.latent = -torch.log(_STRETCH / (soft + _SHIFT) - 1)
        else:
            self.latent = q + (grid - q).clamp(-margin, margin)
        self.latent.requires_grad_()

    def _integers(self) -> Tensor:
        low, high = self.layer.qrange
        if self.method == "adaround":
            return self.floor + _rectified_sigmoid(self.latent)
        return round_through(self.latent, low, high)

    def weight(self) -> Tensor:
        """(O, ...) weight as the layer computes with it now, differentiable."""
        return (self._integers() - self.zero) * self.layer.per_channel(self.log_scale.exp())

    def regularizer(self, beta: float) -> Tensor | None:
        """AdaRound's pull towards 0 and 1, summed; None where rounding is hard anyway."""
        if self.method != "adaround":
            return None
        return (1 - (2 * _rectified_sigmoid(self.latent) - 1).abs().pow(beta)).sum()

    @torch.no_grad()
    def harden(self) -> None:
        """Write integers, scale and bias into the layer."""
        low, high = self.layer.qrange
        q = self._integers() if self.method != "adaround" else self.floor + (self.latent > 0)
        self.layer.q_weight = q.round().clamp(low, high).to(torch.int8)
        self.layer.scale = self.log_scale.detach().exp()
        if self.bias is not None:
            self.layer.bias = self.bias.detach().clone()
