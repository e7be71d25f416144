"""Training against the full-precision logits: the whole model as one unit.

The loss is ``T^2 KL(softmax(z_fp / T) || softmax(z_q / T))`` (Hinton et al., arXiv 1503.02531, section 2).  With
rounding, steps and biases free this is the last, longest pack of a reconstruction; with scales and zero points only,
and a penalty on how far they move, it is CAT's refinement (:mod:`cat_plugin.ptq.learned.refinement`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cat_plugin.ptq.learned.augment import mirrored_and_shifted, with_patches
from cat_plugin.ptq.learned.reconstruction import Outcome
from cat_plugin.ptq.learned.soft_unit import SoftUnit, run_float
from cat_plugin.ptq.learned.steps import DropMask

__all__ = ["LogitTraining", "divergence", "train_on_logits"]

_CHECKS = 8  # looks at the state in a full run


@dataclass(frozen=True)
class LogitTraining:
    """Settings of :func:`train_on_logits`.

    Attributes
    ----------
    steps, batch_size : int
        Gradient steps and rows in each.
    temperature : float
        ``T`` of the loss.
    drop_probability : float
        Share of activation elements left unquantized.
    augment : bool
        Vary the inputs (:mod:`~cat_plugin.ptq.learned.augment`), their logits asked for anew.
    piece : int
        Rows that pass through the model at a time: a step of more adds up their gradients, so that its memory does not
        grow with ``batch_size``.
    """

    steps: int = 500
    batch_size: int = 32
    temperature: float = 2.0
    drop_probability: float = 0.0
    augment: bool = False
    piece: int = 32


def divergence(z_q: Tensor, z_fp: Tensor, temperature: float) -> Tensor:
    """Mean over rows of ``T^2 KL(softmax(z_fp / T) || softmax(z_q / T))``; logits (N, C)."""
    log_q = F.log_softmax(z_q / temperature, 1)
    log_p = F.log_softmax(z_fp / temperature, 1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * temperature**2


def _layout(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.contiguous()


@torch.no_grad()
def _evaluate(soft: SoftUnit, x: Tensor, z: Tensor, settings: LogitTraining) -> float:
    total = 0.0
    for start in range(0, len(x), settings.piece):
        rows = slice(start, start + settings.piece)
        total += float(divergence(soft.run(_layout(x[rows])), z[rows], settings.temperature)) * len(x[rows])
    return total / len(x)


@torch.enable_grad()
def train_on_logits(
    soft: SoftUnit,
    groups: list[dict[str, Any]],
    inputs: Tensor,
    logits: Tensor,
    settings: LogitTraining,
    generator: torch.Generator,
    *,
    penalty: Callable[[], Tensor] | None = None,
    tick: Callable[[int], None] | None = None,
) -> Outcome:
    """Descend the divergence of the logits, in place.

    Parameters
    ----------
    soft : SoftUnit
        The whole model.
    groups : list of dict
        Adam's parameter groups; rates fall to zero along a cosine.
    inputs, logits : Tensor
        (N, ...) calibration inputs and (N, C) full-precision logits.
    settings : LogitTraining
        How to train.
    generator : torch.Generator
        CPU generator of every random choice.
    penalty : callable or None
        Added to the loss.
    tick : callable or None
        Called with the number of each finished step.

    Returns
    -------
    Outcome
        Divergence before and after on the first 256 inputs, where the best state seen is kept; if none is better than
        the initial values, or the loss turns NaN, these are.
    """
    initial, best = soft.state(), soft.snapshot()
    check = slice(0, min(len(inputs), 256))
    before = after = _evaluate(soft, inputs[check], logits[check], settings)
    every = max(settings.steps // _CHECKS, 1)
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), foreach=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    mask = DropMask(settings.drop_probability, generator, inputs.device)
    order = torch.empty(0, dtype=torch.long)
    batch = min(settings.batch_size, len(inputs))
    for step in range(settings.steps):
        if len(order) < batch:
            order = torch.randperm(len(inputs), generator=generator)
        rows, order = order[:batch].to(inputs.device), order[batch:]
        x = inputs[rows]
        if settings.augment:
            x = with_patches(mirrored_and_shifted(x, generator), generator)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1.0 + math.cos(math.pi * step / settings.steps))
        optimizer.zero_grad()
        total = 0.0
        for start in range(0, batch, settings.piece):
            part = slice(start, start + settings.piece)
            some = _layout(x[part])
            if settings.augment:
                with torch.no_grad():
                    target = run_float(soft.module, soft.unit.nodes, soft.unit.source, some, soft.unit.output)
            else:
                target = logits[rows[part]]
            loss = divergence(soft.run(some, mask.like), target, settings.temperature) * (len(some) / batch)
            if penalty is not None and start == 0:
                loss = loss + penalty()
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if not math.isfinite(total):
            soft.restore(initial)
            return Outcome(before, before, step, "the loss became NaN or infinite: initial values kept")
        optimizer.step()
        if tick is not None:
            tick(step + 1)
        if (step + 1) % every == 0 or step + 1 == settings.steps:
            now = _evaluate(soft, inputs[check], logits[check], settings)
            if now < after:
                after, best = now, soft.snapshot()
    if not after < before:
        soft.restore(initial)
        return Outcome(before, before, settings.steps, "training did not improve it: initial values kept")
    soft.load(best)
    soft.harden()
    return Outcome(before, after, settings.steps)
