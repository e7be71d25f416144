"""Reconstruction of one unit: gradient steps that bring its quantized output to the full-precision one.

The unit's inputs and full-precision outputs are cached; each step draws a batch, mixes quantized and full-precision
inputs element by element where asked to (QDrop, arXiv 2203.05740, section 3.3), and descends the mean squared error,
optionally weighted by the squared gradient of the task loss (the diagonal Fisher information of BRECQ, arXiv 2102.05426,
equation 10).  Losses are relative to the mean square of the full-precision output, so that learning rates mean the same
in every unit.  The last rows are watched: neither trained on nor, where training follows, fitted to in closed form, so
that initial and trained values are compared on inputs that neither has seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from cat_plugin.ptq.graph.ops import is_batched
from cat_plugin.ptq.graph.units import Unit
from cat_plugin.ptq.learned.rounding import SoftLayer
from cat_plugin.ptq.learned.soft_unit import SoftUnit
from cat_plugin.ptq.learned.steps import DropMask

__all__ = ["Outcome", "Reconstruction", "parameter_groups", "reconstruct", "rows_of_a_step", "watched_rows"]

_STEP_ELEMENTS = 1 << 21  # of the largest activation in a training step
_CHECKS = 10  # looks at the watched rows in a full run
# After so many looks without gain a run goes on with its end, which begins at this share of the steps: what rounding
# gains, it gains while the rates fall to zero.
_PATIENCE, _END = 3, 0.7


@dataclass(frozen=True)
class Reconstruction:
    """Settings of :func:`reconstruct`.

    Attributes
    ----------
    steps, batch_size : int
        Gradient steps and rows in each.
    method : str
        Relaxation of the rounding.
    learn_rounding, learn_steps : bool
        False leaves the integers, or the activations' steps, as they are.
    weight_rate, scale_rate, step_rate, bias_rate : float
        Adam's learning rates of the latent weights (grid units), the weights' scales and the activations' steps
        (relative) and the biases (relative to the layer's output).
    drop_probability : float
        See :mod:`~cat_plugin.ptq.learned.steps`.
    input_mix : float
        Share of full-precision elements in the unit's input.
    regularization : float
        Weight of AdaRound's regulariser.
    bf16 : bool
        Dense convolutions in BF16, see :mod:`~cat_plugin.ptq.learned.precision`.
    """

    steps: int = 500
    batch_size: int = 32
    method: str = "straight_through"
    learn_rounding: bool = True
    learn_steps: bool = True
    weight_rate: float = 0.015
    scale_rate: float = 1e-3
    step_rate: float = 1e-3
    bias_rate: float = 2e-3
    drop_probability: float = 0.0
    input_mix: float = 0.0
    regularization: float = 1e-4
    bf16: bool = False


@dataclass
class Outcome:
    """Losses of a unit before and after, relative to the output's mean square, and why it stopped."""

    before: float
    after: float
    steps: int
    note: str = ""


def watched_rows(count: int) -> int:
    """How many of ``count`` rows, the last ones, training is judged on; 0 if they are too few to spare any.

    A sixteenth is too little to be missed and enough to tell better from worse.
    """
    held = count // 16
    return held if held >= 8 else 0


def rows_of_a_step(unit: Unit, most: int) -> int:
    """Rows of a training step: as many as keep the unit's largest activation within a cache's reach.

    Large feature maps hold many positions, each of which is an example to a convolution, so that few images do.
    """
    sizes = [math.prod(node.meta["val"].shape[1:]) for node in unit.nodes if is_batched(node)]
    return max(min(_STEP_ELEMENTS // max(sizes, default=1), most), min(4, most))


def _rows(x: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """Rows of a cached tensor, which may lie in a file, where they are computed on."""
    return _layout(x[rows.to(x.device)].to(device))


def _layout(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.contiguous()


@torch.no_grad()
def _evaluate(soft: SoftUnit, x: Tensor, y: Tensor, weights: Tensor | None, batch_size: int) -> float:
    """Loss of the unit as it stands over that of an output of zeros."""
    error = power = 0.0
    device = next(iter(soft.layers)).weight.device if soft.layers else x.device
    for start in range(0, len(x), batch_size):
        rows = slice(start, start + batch_size)
        target = y[rows].to(device)
        squares = (soft.run(_layout(x[rows].to(device))) - target).square()
        error += float((squares if weights is None else squares * weights).sum())
        power += float((target.square() if weights is None else target.square() * weights).sum())
    return error / max(power, 1e-20)


class _Watch:
    """Watched rows: keeps the best state seen and says when nothing is being gained."""

    def __init__(self, soft: SoftUnit, evaluate: Callable[[], float], steps: int) -> None:
        self.soft, self.evaluate = soft, evaluate
        self.every = max(steps // _CHECKS, 1)
        self.best = self.first = evaluate()
        self.state = soft.snapshot()
        self.stale = 0

    def look(self) -> bool:
        """Evaluate; True when the last :data:`_PATIENCE` checks brought nothing."""
        loss = self.evaluate()
        self.stale += 1
        if loss < self.best:
            if loss < 0.998 * self.best:
                self.stale = 0
            self.best, self.state = loss, self.soft.snapshot()
        return self.stale >= _PATIENCE


@torch.enable_grad()
def reconstruct(
    module: fx.GraphModule,
    unit: Unit,
    inputs: Tensor,
    full_inputs: Tensor,
    targets: Tensor,
    settings: Reconstruction,
    generator: torch.Generator,
    *,
    weights: Tensor | None = None,
    guidance: Callable[[Tensor, Tensor], Tensor] | None = None,
    tick: Callable[[int], None] | None = None,
) -> Outcome:
    """Train a unit, in place.

    Parameters
    ----------
    module : fx.GraphModule
        The prepared graph.
    unit : Unit
        With ranges and integers chosen.
    inputs, full_inputs : Tensor
        (N, ...) what the quantized and the full-precision network feed to the unit.
    targets : Tensor
        (N, ...) the unit's full-precision output.
    settings : Reconstruction
        How to train.
    generator : torch.Generator
        CPU generator of every random choice.
    weights : Tensor or None
        (1, ...) non-negative weights of the output's elements.
    guidance : callable or None
        (output, rows) -> additional loss.
    tick : callable or None
        Called with the number of each finished step.

    Returns
    -------
    Outcome
        Losses on the last :func:`watched_rows` rows, and the steps taken.  The best state seen there is kept; training
        that gains nothing skips to the end of its schedule; a unit whose loss turns NaN, or that does not get better,
        keeps its initial values and says so.
    """
    soft = SoftUnit(module, unit, lambda layer: SoftLayer(layer, settings.method), bf16=settings.bf16)
    initial = soft.state()
    device = unit.layers[0].weight.device if unit.layers else inputs.device
    held = watched_rows(len(inputs))
    count = len(inputs) - held
    check = slice(count, None) if held else slice(None)

    def evaluate(unit_now: SoftUnit = soft) -> float:
        return _evaluate(unit_now, inputs[check], targets[check], weights, settings.batch_size)

    power = float(
        (targets.square() if weights is None else targets.square() * weights.to(targets.device)).mean()
    )
    if not soft.layers or power == 0.0 or settings.steps < 1:
        before = evaluate()
        return Outcome(before, before, 0, "" if soft.layers else "nothing to train")
    if settings.method == "adaround":  # its loss is that of integers only at the end
        start = SoftUnit(module, unit, lambda layer: SoftLayer(layer, "straight_through"))
        watch = _Watch(soft, lambda: evaluate(start), settings.steps)
    else:
        watch = _Watch(soft, evaluate, settings.steps)
    before = watch.best
    optimizer = torch.optim.Adam(parameter_groups(soft, settings), betas=(0.9, 0.99), foreach=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    mask = DropMask(settings.drop_probability, generator, device)
    mix = DropMask(settings.input_mix, generator, device)
    order = torch.empty(0, dtype=torch.long)
    batch = min(settings.batch_size, count)
    step = done = 0
    end = round(_END * settings.steps)
    while step < settings.steps:
        if len(order) < batch:
            order = torch.randperm(count, generator=generator)
        rows, order = order[:batch], order[batch:]
        x = _rows(inputs, rows, device)
        keep = mix.like(x)
        if keep is not None:
            x = torch.lerp(_rows(full_inputs, rows, device), x, keep)
        y = soft.run(x, mask.like)
        error = (y - _rows(targets, rows, device)).square()
        if weights is not None:
            error = error * weights
        loss = error.mean() / power
        if guidance is not None:
            loss = loss + guidance(y, rows)
        share = step / settings.steps
        if settings.method == "adaround" and share > 0.1:
            for layer in soft.layers.values():
                loss = loss + settings.regularization * layer.regularizer(20.0 - 18.0 * share)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1.0 + math.cos(math.pi * share))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if not math.isfinite(float(loss.detach())):
            soft.restore(initial)
            return Outcome(before, before, done, "the loss became NaN or infinite: initial values kept")
        optimizer.step()
        step, done = step + 1, done + 1
        if tick is not None:
            tick(done)
        if settings.method != "adaround" and step % watch.every == 0 and watch.look():
            step = max(step, end)
    if settings.method == "adaround":
        soft.harden()
        after = evaluate(SoftUnit(module, unit, lambda layer: SoftLayer(layer, "straight_through")))
    else:
        watch.look()
        after = watch.best
        soft.load(watch.state)
        soft.harden()
    if not after < before:
        soft.restore(initial)
        return Outcome(before, before, done, "training did not improve the unit: initial values kept")
    return Outcome(before, after, done)


def parameter_groups(soft: SoftUnit, settings: Reconstruction) -> list[dict[str, Any]]:
    """Adam's parameter groups for what is to be learned of a unit."""
    groups: list[dict[str, Any]] = []
    layers = list(soft.layers.values())
    if settings.learn_rounding:
        groups.append({"params": [layer.latent for layer in layers], "lr": settings.weight_rate})
    groups.append({"params": [layer.log_scale for layer in layers], "lr": settings.scale_rate})
    if settings.learn_steps and soft.activations:
        steps = [activation.log_scale for activation in soft.activations.values()]
        groups.append({"params": steps, "lr": settings.step_rate})
    for layer in layers:
        if layer.bias is not None:
            # Adam moves by the rate whatever the gradient's size, so the rate carries the output's scale
            spread = float(layer.layer.weight.flatten(1).norm(dim=1).mean())
            groups.append({"params": [layer.bias], "lr": settings.bias_rate * max(spread, 1e-3)})
    return groups
