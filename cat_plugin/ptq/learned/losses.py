"""The divergence of logits, and what a change of a block's output does to them: gradients and losses of the network.

The task loss is the cross entropy against the full-precision network's own most likely class, since labels are not
given.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from cat_plugin.ptq.graph.units import Unit
from cat_plugin.ptq.learned.soft_unit import run_float

__all__ = [
    "divergence",
    "fisher_weights",
    "loss_gradient",
    "nodes_after",
    "prediction_difference",
    "tail_losses",
]


def divergence(z_q: Tensor, z_fp: Tensor, temperature: float) -> Tensor:
    """Mean over rows of ``T^2 KL(softmax(z_fp / T) || softmax(z_q / T))``; logits (N, C)."""
    log_q = F.log_softmax(z_q / temperature, 1)
    log_p = F.log_softmax(z_fp / temperature, 1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * temperature**2


def nodes_after(module: fx.GraphModule, unit: Unit) -> tuple[list[fx.Node], fx.Node]:
    """The nodes behind a unit, and the one that holds the logits."""
    order = [n for n in module.graph.nodes if n.op not in ("get_attr", "output", "placeholder")]
    logits = next(n for n in module.graph.nodes if n.op == "output").args[0]
    return order[order.index(unit.output) + 1 :], logits


def _logits(module: fx.GraphModule, unit: Unit, y: Tensor) -> Tensor:
    nodes, logits = nodes_after(module, unit)
    return run_float(module, nodes, unit.output, y, logits)


def tail_losses(module: fx.GraphModule, unit: Unit, y: Tensor, classes: Tensor) -> Tensor:
    """(n,) task loss of each row when the unit's output is ``y`` and everything behind is full precision."""
    return F.cross_entropy(_logits(module, unit, y), classes, reduction="none")


def loss_gradient(module: fx.GraphModule, unit: Unit, y: Tensor, classes: Tensor) -> Tensor:
    """Gradient of each row's task loss for the unit's output; of the shape of ``y``."""
    with torch.enable_grad():
        leaf = y.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(tail_losses(module, unit, leaf, classes).sum(), leaf)
    return gradient


def fisher_weights(module: fx.GraphModule, unit: Unit, targets: Tensor, batch_size: int) -> Tensor:
    """Diagonal of the empirical Fisher information of the unit's output, one value an element.

    Squared gradients of the task loss, averaged over the calibration rows and scaled to mean 1 (BRECQ, arXiv
    2102.05426, equation 10).

    Returns
    -------
    Tensor
        (1, ...) of one output's shape.
    """
    total = torch.zeros_like(targets[:1])
    for start in range(0, len(targets), batch_size):
        y = targets[start : start + batch_size]
        with torch.no_grad():
            classes = _logits(module, unit, y).argmax(1)
        total += loss_gradient(module, unit, y, classes).square().sum(0, keepdim=True)
    mean = total.mean()
    # where nothing behind reads an element, it must still not be free to run away
    return (total / mean).clamp(min=0.01) if float(mean) > 0 else torch.ones_like(total)


def prediction_difference(
    module: fx.GraphModule, unit: Unit, targets: Tensor, weight: float, temperature: float
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """PD-Quant's guidance: how far a unit's quantized output moves the prediction of the network behind it.

    ``weight * KL(f(y) || f(y_q))`` with ``f`` the full-precision rest of the network (Liu et al., "PD-Quant", arXiv
    2212.07048, equation 5).  A step then costs a pass through the rest of the network.  Default: weight 0, because
    the whole-model stage sees the same loss with everything quantized at the same price a step.

    Returns
    -------
    callable or None
        (output of the unit, row numbers) -> loss; None when the weight is 0 or nothing follows the unit.
    """
    if weight <= 0 or not nodes_after(module, unit)[0]:
        return None

    def loss(y: Tensor, rows: Tensor) -> Tensor:
        with torch.no_grad():
            reference = _logits(module, unit, targets[rows.to(targets.device)].to(y.device))
        return weight * divergence(_logits(module, unit, y), reference, temperature)

    return loss
