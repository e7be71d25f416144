"""Reconstruction of one unit: gradient steps that bring its quantized output to the full-precision one.

The unit's inputs and full-precision outputs are cached; each step draws a batch, mixes quantized and full-precision
inputs element by element where asked to (QDrop, arXiv 2203.05740, section 3.3), and descends the mean squared error,
optionally weighted by the squared gradient of the task loss (the diagonal Fisher information of BRECQ, arXiv 2102.05426,
equation 10).  Losses are relative to the mean square of the full-precision output, so that learning rates mean the same
in every unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from cat_plugin.ptq.graph.ops import is_batched
from cat_plugin.ptq.graph.units import Unit
from cat_plugin.ptq.learned.descent import Outcome, Schedule, descend, split_rows
from cat_plugin.ptq.learned.rounding import Rates, Rounding, StraightThrough, parameter_groups
from cat_plugin.ptq.learned.soft_unit import SoftUnit
from cat_plugin.ptq.learned.steps import DropMask

__all__ = ["Reconstruction", "reconstruct", "rows_of_a_step", "stored"]

_STEP_ELEMENTS = 1 << 21  # of the largest activation in a training step
_LOOKS, _PATIENCE = 10, 3


@dataclass(frozen=True)
class Reconstruction:
    """Settings of :func:`reconstruct`.

    Attributes
    ----------
    steps, batch_size : int
        Gradient steps and rows in each.
    rounding : type
        One of :data:`~cat_plugin.ptq.learned.rounding.ROUNDINGS`.
    rates : Rates
        Learning rates.
    drop_probability : float
        See :mod:`~cat_plugin.ptq.learned.steps`.
    input_mix : float
        Share of full-precision elements in the unit's input.
    bf16 : bool
        Dense convolutions in BF16, see :mod:`~cat_plugin.ptq.learned.precision`.
    """

    steps: int = 500
    batch_size: int = 32
    rounding: type[Rounding] = StraightThrough
    rates: Rates = field(default_factory=Rates)
    drop_probability: float = 0.0
    input_mix: float = 0.0
    bf16: bool = False


def rows_of_a_step(unit: Unit, most: int) -> int:
    """Rows of a training step: as many as keep the unit's largest activation within a cache's reach.

    Large feature maps hold many positions, each of which is an example to a convolution, so that few images do.
    """
    sizes = [math.prod(node.meta["val"].shape[1:]) for node in unit.nodes if is_batched(node)]
    return max(min(_STEP_ELEMENTS // max(sizes, default=1), most), min(4, most))


def stored(x: Tensor) -> Tensor:
    """``x`` in the memory layout that convolutions are fastest on."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.contiguous()


class _OutputError:
    """Squared error of a unit's output over the power of the full-precision one."""

    def __init__(
        self,
        soft: SoftUnit[Rounding],
        inputs: Tensor,
        full_inputs: Tensor,
        targets: Tensor,
        settings: Reconstruction,
        generator: torch.Generator,
        weights: Tensor | None,
        guidance: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> None:
        self.soft, self.inputs, self.full_inputs, self.targets = soft, inputs, full_inputs, targets
        self.weights, self.guidance, self.batch_size = weights, guidance, settings.batch_size
        self.device = next(iter(soft.layers)).weight.device if soft.layers else inputs.device
        self.count, self.judged = split_rows(len(inputs))
        self.power = float(self._weighted(targets.square(), targets.device).mean())
        self.mask = DropMask(settings.drop_probability, generator, self.device)
        self.mix = DropMask(settings.input_mix, generator, self.device)

    def _weighted(self, squares: Tensor, device: torch.device) -> Tensor:
        return squares if self.weights is None else squares * self.weights.to(device)

    def _rows(self, x: Tensor, rows: Tensor | slice) -> Tensor:
        """Rows of a cached tensor, which may lie in a file, where they are computed on."""
        return stored(x[rows if isinstance(rows, slice) else rows.to(x.device)].to(self.device))

    def losses(self, rows: Tensor) -> Iterator[Tensor]:
        x = self._rows(self.inputs, rows)
        keep = self.mix.like(x)
        if keep is not None:
            x = torch.lerp(self._rows(self.full_inputs, rows), x, keep)
        y = self.soft.run(x, self.mask.like)
        error = self._weighted((y - self._rows(self.targets, rows)).square(), self.device)
        loss = error.mean() / self.power
        yield loss if self.guidance is None else loss + self.guidance(y, rows)

    def judge(self) -> float:
        error = power = 0.0
        for start in range(self.judged.start, self.judged.stop, self.batch_size):
            rows = slice(start, min(start + self.batch_size, self.judged.stop))
            target = self.targets[rows].to(self.device)
            squares = (self.soft.run(self._rows(self.inputs, rows)) - target).square()
            error += float(self._weighted(squares, self.device).sum())
            power += float(self._weighted(target.square(), self.device).sum())
        return error / max(power, 1e-20)


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
        Losses on the rows held out, relative to the output's mean square there, and the steps taken.  Training that gains
        nothing skips to the end of its schedule; a unit that does not get better keeps its initial values.
    """
    soft = SoftUnit(module, unit, settings.rounding, bf16=settings.bf16)
    error = _OutputError(soft, inputs, full_inputs, targets, settings, generator, weights, guidance)
    if not soft.layers or error.power == 0.0 or settings.steps < 1:
        with torch.no_grad():
            before = error.judge()
        return Outcome(before, before, 0, "" if soft.layers else "nothing to train")
    return descend(
        soft,
        parameter_groups(soft, settings.rates),
        error,
        Schedule(settings.steps, settings.batch_size, _LOOKS, _PATIENCE),
        generator,
        tick=tick,
    )
