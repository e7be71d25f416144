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
from cat_plugin.ptq.learned.logit_training import LogitTraining, train_on_logits
from cat_plugin.ptq.learned.reconstruction import Outcome
from cat_plugin.ptq.learned.rounding import round_through
from cat_plugin.ptq.learned.soft_unit import SoftUnit
from cat_plugin.ptq.learned.steps import SoftActivation
from cat_plugin.ptq.quantizers.uniform import ActQuantizer

__all__ = ["GridLayer", "refine"]


class GridLayer:
    """A layer with fixed integers whose grid is refined."""

    def __init__(self, layer: QuantOp) -> None:
        if layer.q_weight is None:
            raise ValueError(f"layer {layer.name} has no integers to start from")
        self.layer = layer
        self.integers = layer.q_weight.float()
        self.initial = layer.scale.detach().log()
        self.log_scale = self.initial.clone().requires_grad_()
        self.bias = layer.bias
        self.zero0 = layer.zero_point.float()
        # symmetric weights have no zero point to refine
        self.zero = self.zero0.clone().requires_grad_() if bool(self.zero0.any()) else None

    def _zero_point(self) -> Tensor:
        low, high = self.layer.qrange
        return self.zero0 if self.zero is None else round_through(self.zero, low, high)

    def weight(self) -> Tensor:
        """(O, ...) weight, differentiable in scale and zero point."""
        return (self.integers - self.layer.per_channel(self._zero_point())) * self.layer.per_channel(
            self.log_scale.exp()
        )

    @torch.no_grad()
    def harden(self) -> None:
        """Write the grid into the layer."""
        self.layer.scale = self.log_scale.exp()
        self.layer.zero_point = self._zero_point().long()


@torch.enable_grad()
def refine(
    module: torch.fx.GraphModule,
    unit: Unit,
    inputs: Tensor,
    logits: Tensor,
    settings: LogitTraining,
    generator: torch.Generator,
    *,
    rate: float = 1e-3,
    zero_rate: float = 5e-3,
    penalty: float = 0.01,
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
    inputs, logits : Tensor
        (N, ...) calibration inputs and (N, C) full-precision logits.
    settings : LogitTraining
        Steps, batch and temperature.
    generator : torch.Generator
        CPU generator of every random choice.
    rate, zero_rate : float
        Adam's learning rates of the scales (relative) and of the zero points (integers).
    penalty : float
        ``lambda_p``.
    bf16 : bool
        Dense convolutions in BF16, see :mod:`~cat_plugin.ptq.learned.precision`.
    tick : callable or None
        Called with the number of each finished step.

    Returns
    -------
    Outcome
        Divergence of the logits before and after.
    """
    soft = SoftUnit(module, unit, GridLayer, bf16=bf16)
    layers: list[GridLayer] = list(soft.layers.values())
    steps: dict[ActQuantizer, SoftActivation] = soft.activations
    start = [activation.log_scale.detach().clone() for activation in steps.values()]
    groups = [{"params": [x.log_scale for x in layers] + [x.log_scale for x in steps.values()], "lr": rate}]
    zeros = [layer.zero for layer in layers if layer.zero is not None]
    if zeros:
        groups.append({"params": zeros, "lr": zero_rate})

    def distance() -> Tensor:
        moved = torch.stack(
            [(a.log_scale - s).square() for a, s in zip(steps.values(), start, strict=True)]
        ).sum()
        for layer in layers:
            moved = moved + (layer.log_scale - layer.initial).square().sum()
            if layer.zero is not None:
                moved = moved + (layer.zero - layer.zero0).square().sum()
        return penalty * moved

    return train_on_logits(soft, groups, inputs, logits, settings, generator, penalty=distance, tick=tick)
