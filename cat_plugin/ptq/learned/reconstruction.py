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
from cat_plugin.ptq.rows import Rows

__all__ = ["Reconstruction", "reconstruct", "rows_of_a_step", "stored"]

_STEP_ELEMENTS = 1 << 21  # of the largest activation in a training step
_WHOLE = 1 << 24  # values that are squared at once
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
        Dense layers in BF16, see :mod:`~cat_plugin.ptq.learned.precision`.
    """

    steps: int = 500
    batch_size: int = 32
    rounding: type[Rounding] = StraightThrough
    rates: Rates = field(default_factory=Rates)
    drop_probability: float = 0.0
    input_mix: float = 0.0
    bf16: bool = False


def rows_of_a_step(unit: Unit, most: int, device: torch.device | None = None) -> int:
    """Rows of a training step: as many as keep the unit's largest activation within a cache's reach.

    Large feature maps hold many positions, each of which is an example to a convolution, so that few images do.  A GPU takes
    sixteen times as much: with less it waits for the next operation to be started.
    """
    elements = _STEP_ELEMENTS * (16 if device is not None and device.type == "cuda" else 1)
    sizes = [math.prod(node.meta["val"].shape[1:]) for node in unit.nodes if is_batched(node)]
    return max(min(elements // max(sizes, default=1), most), min(4, most))


def stored(x: Tensor) -> Tensor:
    """``x`` in the memory layout that convolutions are fastest on."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.contiguous()


class _OutputError:
    """Squared error of a unit's outputs over the power of the full-precision ones."""

    def __init__(
        self,
        soft: SoftUnit[Rounding],
        inputs: Rows,
        full_inputs: Rows,
        targets: Rows,
        settings: Reconstruction,
        generator: torch.Generator,
        weights: Rows | None,
        guidance: Callable[[Rows, Tensor], Tensor] | None,
    ) -> None:
        self.soft, self.inputs, self.full_inputs, self.targets = soft, inputs, full_inputs, targets
        self.weights, self.guidance, self.batch_size = weights, guidance, settings.batch_size
        self.device = next(iter(soft.layers)).weight.device if soft.layers else inputs.device
        self.count, self.judged = split_rows(len(inputs))
        self.powers = [self._power(output) for output in range(len(targets.tensors))]
        self.mask = DropMask(settings.drop_probability, generator, self.device)
        self.mix = DropMask(settings.input_mix, generator, self.device)

    @property
    def silent(self) -> bool:
        """Whether full precision gives nothing but zeros."""
        return not any(self.powers)

    def _power(self, output: int) -> float:
        """Mean square of one of the outputs, without a copy of all its rows."""
        x = self.targets.tensors[output]
        if x.numel() <= _WHOLE:
            return float(self._weighted(output, x.square(), x.device).mean())
        total = 0.0
        for part in torch.split(x, self.batch_size):
            total += float(self._weighted(output, part.square(), part.device).sum(dtype=torch.float64))
        return total / max(x.numel(), 1)

    def _weighted(self, output: int, squares: Tensor, device: torch.device) -> Tensor:
        return squares if self.weights is None else squares * self.weights.tensors[output].to(device)

    def _rows(self, x: Rows, rows: Tensor | slice) -> Rows:
        """Rows of cached tensors, which may lie in files, where they are computed on."""
        return x[rows].mapped(lambda each: stored(each.to(self.device)))

    def _mixed(self, rows: Tensor) -> Rows:
        """Inputs with their share of full-precision elements."""
        mixed = []
        for x, full in zip(self.inputs.tensors, self.full_inputs.tensors, strict=True):
            (value,) = self._rows(Rows([x]), rows).tensors
            keep = self.mix.like(value) if value.is_floating_point() else None
            if keep is not None:
                value = torch.lerp(self._rows(Rows([full]), rows).tensors[0], value, keep)
            mixed.append(value)
        return Rows(mixed)

    def losses(self, rows: Tensor) -> Iterator[Tensor]:
        y = self.soft.run(self._mixed(rows), self.mask.like)
        targets = self._rows(self.targets, rows)
        loss: Tensor | None = None
        for output, (mine, other) in enumerate(zip(y.tensors, targets.tensors, strict=True)):
            if self.powers[output]:
                part = self._weighted(output, (mine - other).square(), self.device).mean()
                part = part / self.powers[output]
                loss = part if loss is None else loss + part
        assert loss is not None
        yield loss if self.guidance is None else loss + self.guidance(y, rows)

    def judge(self) -> Tensor:
        errors, powers = [0.0] * len(self.powers), [0.0] * len(self.powers)
        for start in range(self.judged.start, self.judged.stop, self.batch_size):
            rows = slice(start, min(start + self.batch_size, self.judged.stop))
            targets = self.targets[rows].to(self.device)
            found = self.soft.run(self._rows(self.inputs, rows))
            for output, (mine, other) in enumerate(zip(found.tensors, targets.tensors, strict=True)):
                errors[output] += float(self._weighted(output, (mine - other).square(), self.device).sum())
                powers[output] += float(self._weighted(output, other.square(), self.device).sum())
        parts = [
            e / max(p, 1e-20) for e, p, all_rows in zip(errors, powers, self.powers, strict=True) if all_rows
        ]
        return torch.tensor([sum(parts) if parts else errors[0] / max(powers[0], 1e-20)])


def reconstruct(
    module: fx.GraphModule,
    unit: Unit,
    inputs: Rows,
    full_inputs: Rows,
    targets: Rows,
    settings: Reconstruction,
    generator: torch.Generator,
    *,
    weights: Rows | None = None,
    guidance: Callable[[Rows, Tensor], Tensor] | None = None,
    tick: Callable[[int], None] | None = None,
) -> Outcome:
    """Train a unit, in place.

    Parameters
    ----------
    module : fx.GraphModule
        The prepared graph.
    unit : Unit
        With ranges and integers chosen.
    inputs, full_inputs : Rows
        (N, ...) what the quantized and the full-precision network feed to the unit.
    targets : Rows
        (N, ...) the unit's full-precision outputs; the errors of several add up.
    settings : Reconstruction
        How to train.
    generator : torch.Generator
        CPU generator of every random choice.
    weights : Rows or None
        (1, ...) non-negative weights of the outputs' elements.
    guidance : callable or None
        (outputs, rows) -> additional loss.
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
    if not soft.layers or error.silent or settings.steps < 1:
        with torch.no_grad():
            before = float(error.judge())
        return Outcome(before, before, 0, "" if soft.layers else "nothing to train")
    return descend(
        soft,
        parameter_groups(soft, settings.rates),
        error,
        Schedule(settings.steps, settings.batch_size, _LOOKS, _PATIENCE),
        generator,
        tick=tick,
    )
