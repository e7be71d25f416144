"""Training against the full-precision logits, or other results: the whole model as one unit.

The loss of logits is ``T^2 KL(softmax(z_fp / T) || softmax(z_q / T))`` (Hinton et al., arXiv 1503.02531, section 2).  With
rounding, steps and biases free this is the last, longest pack of a reconstruction; with scales and zero points only,
and a penalty on how far they move, it is CAT's refinement (:mod:`cat_plugin.ptq.learned.refinement`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cat_plugin.ptq.learned.augment import mirrored_and_shifted, with_patches
from cat_plugin.ptq.learned.descent import Outcome, Schedule, descend, split_rows
from cat_plugin.ptq.learned.quality import Quality
from cat_plugin.ptq.learned.reconstruction import stored
from cat_plugin.ptq.learned.soft_unit import SoftUnit, run_float_rows
from cat_plugin.ptq.rows import Rows

__all__ = ["LogitTraining", "train_on_logits"]

_LOOKS = 4
_VIEWS = 4  # of each image that is judged: the error of a rounded network is redrawn by a shift, and few images are spared
_ROWS = 16  # without gradients they fit, and on one thread torch computes 1 x 1 convolutions of fewer the slow way


@dataclass(frozen=True)
class LogitTraining:
    """Settings of :func:`train_on_logits`.

    Attributes
    ----------
    steps, batch_size : int
        Gradient steps and rows in each.
    temperature : float
        ``T`` of the loss.
    augment : bool
        Vary the inputs (:mod:`~cat_plugin.ptq.learned.augment`), their logits asked for anew.
    piece : int
        Rows that pass through the model at a time: a step of more adds up their gradients, so that its memory does not
        grow with ``batch_size``.
    """

    steps: int = 500
    batch_size: int = 32
    temperature: float = 2.0
    augment: bool = False
    piece: int = 32


class _Divergence:
    """How far the quantized model's results are from full precision, with what is to be added to it."""

    def __init__(
        self,
        soft: SoftUnit[Any],
        inputs: Rows,
        logits: Rows,
        settings: LogitTraining,
        generator: torch.Generator,
        penalty: Callable[[], Tensor] | None,
        quality: Quality,
    ) -> None:
        self.soft, self.inputs, self.logits, self.settings = soft, inputs, logits, settings
        self.generator, self.penalty, self.quality = generator, penalty, quality
        self.count, self.judged = split_rows(len(inputs))

    def _targets(self, x: Rows) -> Rows:
        """Full precision's results of varied inputs."""
        unit, piece = self.soft.unit, max(self.settings.piece, _ROWS)
        parts = []
        for start in range(0, len(x), piece):
            some = x[slice(start, start + piece)].mapped(stored)
            values = dict(zip(unit.sources, some.tensors, strict=True))
            with torch.no_grad():
                parts.append(run_float_rows(self.soft.module, unit.nodes, values, unit.outputs))
        return Rows([torch.cat(each) for each in zip(*(part.tensors for part in parts), strict=True)])

    def losses(self, rows: Tensor) -> Iterator[Tensor]:
        settings, batch = self.settings, len(rows)
        rows = rows.to(self.inputs.device)
        x = self.inputs[rows]
        if settings.augment:
            x = x.mapped(lambda one: with_patches(mirrored_and_shifted(one, self.generator), self.generator))
        targets = self._targets(x) if settings.augment else self.logits[rows]
        for start in range(0, batch, settings.piece):
            part = slice(start, start + settings.piece)
            some, target = x[part].mapped(stored), targets[part]
            loss = self.quality.error(self.soft.run(some), target, settings.temperature) * (len(some) / batch)
            yield loss if self.penalty is None or start else loss + self.penalty()

    def judge(self) -> Tensor:
        piece, parts = self.settings.piece, []
        for start in range(self.judged.start, self.judged.stop, piece):
            rows = slice(start, min(start + piece, self.judged.stop))
            views = [
                self.quality.errors(self.soft.run(x), targets, self.settings.temperature)
                for x, targets in self._views(rows)
            ]
            parts.append(torch.stack(views).mean(0))
        return torch.cat(parts)

    def _views(self, rows: slice) -> Iterator[tuple[Rows, Rows]]:
        """Rows held out and their logits, as they are and where inputs vary in variations that are the same at every look."""
        x = self.inputs[rows]
        yield x.mapped(stored), self.logits[rows]
        generator = torch.Generator().manual_seed(rows.start)
        for _ in range(_VIEWS - 1 if self.settings.augment else 0):
            view = x.mapped(lambda one: mirrored_and_shifted(one, generator))
            yield view.mapped(stored), self._targets(view)


def train_on_logits(
    soft: SoftUnit[Any],
    groups: list[dict[str, Any]],
    inputs: Tensor | Rows,
    logits: Tensor | Rows,
    settings: LogitTraining,
    generator: torch.Generator,
    *,
    quality: Quality | None = None,
    penalty: Callable[[], Tensor] | None = None,
    tick: Callable[[int], None] | None = None,
) -> Outcome:
    """Descend the divergence of the logits, or the error of other results, in place.

    Parameters
    ----------
    soft : SoftUnit
        The whole model.
    groups : list of dict
        Adam's parameter groups.
    inputs, logits : Tensor or Rows
        (N, ...) calibration inputs and (N, C) full-precision logits, or what else the unit gives.
    settings : LogitTraining
        How to train.
    generator : torch.Generator
        CPU generator of every random choice.
    quality : Quality or None
        What the unit gives; None is one (N, C) of logits.
    penalty : callable or None
        Added to the loss.
    tick : callable or None
        Called with the number of each finished step.

    Returns
    -------
    Outcome
        Divergence before and after on the rows held out (:func:`~cat_plugin.ptq.learned.descent.held_out_rows`), images in
        four views.  These rows are too few to prove a gain of a tenth, so that the trained values stay unless they are
        shown to be worse (:attr:`~cat_plugin.ptq.learned.descent.Schedule.keeps_last`).
    """
    inputs, logits, quality = Rows.of(inputs), Rows.of(logits), quality or Quality()
    objective = _Divergence(soft, inputs, logits, settings, generator, penalty, quality)
    schedule = Schedule(settings.steps, settings.batch_size, _LOOKS, keeps_last=True)
    return descend(soft, groups, objective, schedule, generator, tick=tick)
