"""CAT's refinement: scales and zero points by the divergence of the logits, nothing else.

Minimises ``KL(softmax(z_fp / T) || softmax(z_q / T)) + lambda_p (|s - s0|^2 + |z - z0|^2)`` over the scales ``s`` and
zero points ``z`` of weights and activations, ``s0, z0`` being the initial ones ("CAT: Post-Training Quantization Error
Reduction via Cluster-based Affine Transformation", arXiv 2509.26277, section 3).  Integers and biases stay.  Scales
move in the logarithm, so that the penalty is on their relative change; zero points are rounded in the forward pass and
see the straight-through gradient, and those that are 0 by construction (unsigned or symmetric tensors) are left alone.
Default: 150 steps in ``balanced`` and ``best``, ``lambda_p = 0.01``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cat_plugin.ptq.graph.modules import QuantOp
from cat_plugin.ptq.graph.units import Unit
from cat_plugin.ptq.learned.descent import Outcome
from cat_plugin.ptq.learned.logit_training import LogitTraining, train_on_logits
from cat_plugin.ptq.learned.quality import Quality
from cat_plugin.ptq.learned.rounding import round_through
from cat_plugin.ptq.learned.soft_layer import SoftLayer
from cat_plugin.ptq.learned.soft_unit import SoftUnit
from cat_plugin.ptq.rows import Rows

__all__ = ["GridLayer", "refine"]


class GridLayer(SoftLayer):
    """A layer with fixed integers whose grid is refined.

    Attributes
    ----------
    zero : Tensor or None
        (O,) zero points that are trained; None for symmetric weights, which have none to refine.
    """

    def __init__(self, layer: QuantOp) -> None:
        super().__init__(layer)
        self.bias = layer.bias
        self.initial_scale = self.log_scale.detach().clone()
        self.initial_zero = layer.zero_point.float()
        self.zero = self.initial_zero.clone().requires_grad_() if bool(self.initial_zero.any()) else None

    def trained(self) -> list[Tensor]:
        return [self.log_scale] if self.zero is None else [self.log_scale, self.zero]

    def _zero_point(self) -> Tensor:
        return self.initial_zero if self.zero is None else round_through(self.zero, *self.layer.qrange)

    def weight(self) -> Tensor:
        scale, zero = self.layer.steps(self.log_scale.exp()), self.layer.per_channel(self._zero_point())
        return (self.start - zero) * scale

    def distance(self) -> Tensor:
        """() squared distance of scales and zero points from the initial ones."""
        moved = (self.log_scale - self.initial_scale).square().sum()
        return moved if self.zero is None else moved + (self.zero - self.initial_zero).square().sum()

    @torch.no_grad()
    def harden(self) -> None:
        """Write the grid into the layer."""
        self.layer.scale = self.log_scale.exp()
        self.layer.zero_point = self._zero_point().long()


def refine(
    module: torch.fx.GraphModule,
    unit: Unit,
    inputs: Tensor | Rows,
    logits: Tensor | Rows,
    settings: LogitTraining,
    generator: torch.Generator,
    *,
    rate: float = 1e-3,
    zero_rate: float = 5e-3,
    penalty: float = 0.01,
    quality: Quality | None = None,
    bf16: bool = False,
    tick: Callable[[int], None] | None = None,
) -> Outcome:
    """Refine every scale and zero point, in place.

    Parameters
    ----------
    module : fx.GraphModule
        The prepared graph.
    unit : Unit
        The whole model.
    inputs, logits : Tensor or Rows
        (N, ...) calibration inputs and (N, C) full-precision logits, or what else the unit gives.
    settings : LogitTraining
        Steps, batch and temperature.
    generator : torch.Generator
        CPU generator of every random choice.
    rate, zero_rate : float
        Adam's learning rates of the scales (relative) and of the zero points (integers).
    penalty : float
        ``lambda_p``.
    quality : Quality or None
        What the unit gives; None is one (N, C) of logits.
    bf16 : bool
        Dense layers in BF16, see :mod:`~cat_plugin.ptq.learned.precision`.
    tick : callable or None
        Called with the number of each finished step.

    Returns
    -------
    Outcome
        Divergence of the logits before and after.
    """
    soft = SoftUnit(module, unit, GridLayer, bf16=bf16)
    layers, steps = list(soft.layers.values()), list(soft.activations.values())
    initial = [step.log_scale.detach().clone() for step in steps]
    groups = [{"params": [x.log_scale for x in layers] + [x.log_scale for x in steps], "lr": rate}]
    zeros = [layer.zero for layer in layers if layer.zero is not None]
    if zeros:
        groups.append({"params": zeros, "lr": zero_rate})

    def distance() -> Tensor:
        moved = [(step.log_scale - s).square() for step, s in zip(steps, initial, strict=True)]
        return penalty * torch.stack(moved + [layer.distance() for layer in layers]).sum()

    return train_on_logits(
        soft, groups, inputs, logits, settings, generator, quality=quality, penalty=distance, tick=tick
    )
