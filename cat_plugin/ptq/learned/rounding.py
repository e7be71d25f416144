"""Learned rounding of a layer's weights: one class for each way, by name in :data:`ROUNDINGS`.

All start from integers given (those of the closed form), on the side of the cell on which the real-valued weight lies.
The weight's scale and the bias are trained with the rounding.  Default: :func:`rounding_for`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cat_plugin.ptq.graph.modules import QuantOp
from cat_plugin.ptq.learned.descent import HELD
from cat_plugin.ptq.learned.soft_layer import SoftLayer
from cat_plugin.ptq.learned.soft_unit import SoftUnit

__all__ = [
    "ROUNDINGS",
    "AdaRound",
    "FixedIntegers",
    "Rates",
    "Rounding",
    "Settled",
    "StraightThrough",
    "parameter_groups",
    "round_through",
    "rounding_for",
]

_inside = torch.ops.aten.hardtanh_backward.default
_MARGIN = 0.4  # how near to its cell's border, at 0.5, a latent weight may start
_STRETCH, _SHIFT = 1.2, 0.1  # of AdaRound's sigmoid
_FEW = 3  # bits
_WARM_UP, _PULL = 0.1, 3e-3  # share of the steps without AdaRound's regulariser, and its weight


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


@dataclass(frozen=True)
class Rates:
    """Adam's learning rates.

    Attributes
    ----------
    weight : float
        Of what integers are rounded from, in grid units.
    scale : float
        Of the weights' scales, relative.
    step : float or None
        Of the activations' steps, relative; None leaves them as they are.
    bias : float
        Of the biases, relative to the layer's output.
    """

    weight: float = 0.015
    scale: float = 1e-3
    step: float | None = 1e-3
    bias: float = 2e-3


class Rounding(SoftLayer):
    """A layer whose rounding, scale and bias are trained.

    Parameters
    ----------
    layer : QuantOp
        With integers chosen.

    Attributes
    ----------
    rates : Rates
        What a unit is trained with.
    latent : Tensor or None
        What the integers are rounded from; None if they stay as they are.
    """

    rates: ClassVar[Rates] = Rates()
    latent: Tensor | None = None

    def __init__(self, layer: QuantOp) -> None:
        super().__init__(layer)
        self.zero = layer.per_channel(layer.zero_point).float()
        self.bias = None if layer.bias is None else layer.bias.detach().clone().requires_grad_()

    @property
    def grid(self) -> Tensor:
        """(O, ...) the real-valued weight in units of the grid."""
        return self.layer.weight / self.layer.steps(self.layer.scale) + self.zero

    @abstractmethod
    def integers(self) -> Tensor:
        """(O, ...) float integers that would be written now; differentiable if the method trains with them."""

    def relaxed_integers(self) -> Tensor:
        """(O, ...) what stands for the integers while gradients are taken."""
        return self.integers()

    def trained(self) -> list[Tensor]:
        return [value for value in (self.latent, self.log_scale, self.bias) if value is not None]

    def weight(self) -> Tensor:
        integers = self.relaxed_integers() if torch.is_grad_enabled() else self.integers()
        return (integers - self.zero) * self.layer.steps(self.log_scale.exp())

    @torch.no_grad()
    def harden(self) -> None:
        """Write integers, scale and bias into the layer."""
        integers = self.integers().round().clamp(*self.layer.qrange)
        self.layer.q_weight = self.layer.admissible(integers).to(torch.int8)
        self.layer.scale = self.log_scale.exp()
        if self.bias is not None:
            self.layer.bias = self.bias.clone()


class StraightThrough(Rounding):
    """``q = round(u)`` with the gradient passed through the rounding.

    A weight may move further than to its neighbour, and the loss is at all times that of integers, so that training may
    stop anywhere (Bengio et al., arXiv 1308.3432; Esser et al., arXiv 1902.08153).
    """

    latent: Tensor

    def __init__(self, layer: QuantOp) -> None:
        super().__init__(layer)
        self.latent = self.start + (self.grid - self.start).clamp(-_MARGIN, _MARGIN)
        self.latent.requires_grad_()

    def integers(self) -> Tensor:
        return round_through(self.latent, *self.layer.qrange)


class Settled(StraightThrough):
    """The same from the middle of every integer's cell: for integers that have been chosen with care.

    Error-compensated and trained integers lie away from the real-valued weights, so that many of these would begin at the
    margin, and the noise of the gradients alone carry them over the border.  From the middle a weight moves where its gradients
    keep a direction.
    """

    def __init__(self, layer: QuantOp) -> None:
        super().__init__(layer)
        self.latent = self.start.clone().requires_grad_()


class AdaRound(Rounding):
    """``q = floor(v) + h(V)`` with the rectified sigmoid ``h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)``.

    The regulariser ``sum 1 - |2 h(V) - 1|^beta``, whose ``beta`` falls while training, pulls every ``h`` to 0 or 1 (Nagel
    et al., "Up or Down?", arXiv 2004.10568, equations 23 and 24).  A weight moves to one of two neighbours.
    """

    relaxed = True
    rates = Rates(weight=0.1, scale=3e-3, step=3e-3, bias=2e-2)
    latent: Tensor

    def __init__(self, layer: QuantOp) -> None:
        super().__init__(layer)
        low, high = layer.qrange
        q, grid = self.start, self.grid
        self.floor = torch.where(grid >= q, q, q - 1).clamp(low, high - 1)
        soft = 0.7 * (q - self.floor) + 0.3 * (grid - self.floor).clamp(0, 1)
        self.latent = -torch.log(_STRETCH / (soft.clamp(0.05, 0.95) + _SHIFT) - 1)
        self.latent.requires_grad_()

    def integers(self) -> Tensor:
        return self.floor + (self.latent > 0)

    def relaxed_integers(self) -> Tensor:
        return self.floor + self._up()

    def _up(self) -> Tensor:
        """(O, ...) share, 0..1, of the way from the lower to the upper neighbour."""
        return (torch.sigmoid(self.latent) * _STRETCH - _SHIFT).clamp(0.0, 1.0)

    def regularizer(self, share: float) -> Tensor | None:
        if share <= _WARM_UP:
            return None
        beta = 20.0 - 18.0 * min(share / HELD, 1.0)
        return _PULL * (1 - (2 * self._up() - 1).abs().pow(beta)).sum()


class FixedIntegers(Rounding):
    """Integers stay as the closed form has chosen them; scale and bias are trained."""

    def integers(self) -> Tensor:
        return self.start


#: By the names that ``QuantSpec(rounding=...)`` takes.
ROUNDINGS: dict[str, type[Rounding]] = {
    "straight_through": StraightThrough,
    "adaround": AdaRound,
    "none": FixedIntegers,
}


def rounding_for(name: str | None, w_bits: int) -> type[Rounding]:
    """The way of learning with a name; by default that for so many bits.

    With few levels a step of the grid is so much that integers which move one by one, as straight-through gradients
    say, raise the loss (MobileNetV2's second block at W2A4: 0.188 to 0.26, at any rate; AdaRound takes it to 0.164).
    """
    return ROUNDINGS[name or ("adaround" if w_bits <= _FEW else "straight_through")]


def parameter_groups(soft: SoftUnit[Rounding], rates: Rates) -> list[dict[str, Any]]:
    """Adam's parameter groups for what is trained of a unit."""
    layers = list(soft.layers.values())
    latents = [layer.latent for layer in layers if layer.latent is not None]
    groups: list[dict[str, Any]] = [{"params": latents, "lr": rates.weight}] if latents else []
    groups.append({"params": [layer.log_scale for layer in layers], "lr": rates.scale})
    if rates.step is not None and soft.activations:
        steps = [activation.log_scale for activation in soft.activations.values()]
        groups.append({"params": steps, "lr": rates.step})
    for layer in layers:
        if layer.bias is not None:
            # Adam moves by the rate whatever the gradient's size, so the rate carries the output's scale
            spread = float(layer.layer.weight.flatten(1).norm(dim=1).mean())
            groups.append({"params": [layer.bias], "lr": rates.bias * max(spread, 1e-3)})
    return groups
