"""The one training loop: gradient steps on some rows, judged on rows held out, with the best state kept.

Adam with learning rates that fall to zero along half a cosine (Loshchilov and Hutter, "SGDR", arXiv 1608.03983, equation
5, without restarts).  The last rows are held out: nothing is trained on them, nor, where training follows, fitted to them
in closed form, so that initial and trained values are compared on inputs that neither was fitted to.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cat_plugin.heap import freed_memory_kept

__all__ = [
    "Objective",
    "Outcome",
    "Schedule",
    "Snapshots",
    "Trained",
    "TrainedInPlace",
    "descend",
    "held_out_rows",
    "split_rows",
]

# Training that gains nothing goes on with the end of its schedule, which begins at this share of the steps: what rounding
# gains, it gains while the rates fall to zero.
_END = 0.7
#: Relaxed rounding keeps its rates for this share of the steps, by which it is that of integers.
HELD = 0.8


@dataclass(frozen=True)
class Outcome:
    """What training has done.

    Attributes
    ----------
    before, after : float
        Loss on the rows held out, of the initial values and of those kept.
    steps : int
        Gradient steps taken.
    note : str
        Why the initial values were kept, if they were.
    """

    before: float
    after: float
    steps: int
    note: str = ""


@dataclass(frozen=True)
class Schedule:
    """How long to train, and how often to judge.

    Attributes
    ----------
    steps, batch_size : int
        Gradient steps and rows in each.
    looks : int
        How often the state is judged in a full run.
    patience : int or None
        After so many looks without gain a run skips to the end of its schedule; None never skips.
    keeps_last : bool
        Whether the last state, where the rates have fallen to zero, is kept unless it is shown to be worse than the initial
        one: by more than the standard error of the mean difference over the examples.  Otherwise the best that was looked at
        is, which of noisy looks is the luckiest, if it is better than the initial one at all.
    """

    steps: int
    batch_size: int
    looks: int
    patience: int | None = None
    keeps_last: bool = False


class Objective(Protocol):
    """What is minimised, and by what the result is judged.

    Attributes
    ----------
    count : int
        Rows to train on, the first ones.
    """

    count: int

    def losses(self, rows: Tensor) -> Iterator[Tensor]:
        """Parts, () each, of the loss of some rows, (n,) int64 on the CPU.

        Each part is differentiated before the next is asked for, so that only one needs memory at a time.
        """

    def judge(self) -> Tensor:
        """(n,) losses of the state as it stands, of each example held out or (1,) of all; called without gradients."""


class Trained(Protocol):
    """What is trained: a unit's layers and quantizers, scales of channels.

    Attributes
    ----------
    relaxed : bool
        Whether training passes differ from what would be written down.
    """

    @property
    def relaxed(self) -> bool: ...

    def regularizers(self, share: float) -> list[Tensor]:
        """What is added to the loss when ``share`` of the steps, 0..1, is done."""

    def snapshot(self) -> list[Tensor]:
        """Copy of everything that is trained."""

    def load(self, snapshot: list[Tensor]) -> None:
        """Go back to a :meth:`snapshot`."""

    def state(self) -> Any:
        """What :meth:`harden` would write over."""

    def restore(self, state: Any) -> None:
        """Undo what was written since :meth:`state`."""

    def harden(self) -> None:
        """Write everything trained into the modules."""


class Snapshots(ABC):
    """What is trained is tensors, which are copied and written back."""

    @abstractmethod
    def _trained(self) -> list[Tensor]:
        """All of them, in one order."""

    def snapshot(self) -> list[Tensor]:
        """Copy of everything that is trained."""
        return [value.detach().clone() for value in self._trained()]

    @torch.no_grad()
    def load(self, snapshot: list[Tensor]) -> None:
        """Go back to a :meth:`snapshot`."""
        for parameter, value in zip(self._trained(), snapshot, strict=True):
            parameter.copy_(value)


class TrainedInPlace(Snapshots):
    """What computes with its trained values as they will be written down: its state is those values."""

    relaxed = False

    @abstractmethod
    def groups(self) -> list[dict[str, Any]]:
        """Adam's parameter groups."""

    def regularizers(self, share: float) -> list[Tensor]:
        """Nothing is added to the loss."""
        return []

    def _trained(self) -> list[Tensor]:
        return [value for group in self.groups() for value in group["params"]]

    state = Snapshots.snapshot
    restore = Snapshots.load


def held_out_rows(count: int) -> int:
    """How many of ``count`` rows, the last ones, training is judged on; 0 if they are too few to spare any.

    A sixteenth is too little to be missed and enough to tell better from worse.
    """
    held = count // 16
    return held if held >= 8 else 0


def split_rows(count: int) -> tuple[int, slice]:
    """How many of ``count`` rows, the first ones, to train on, and which to judge on: those held out, else all."""
    held = held_out_rows(count)
    return count - held, slice(count - held if held else 0, count)


class _Judge:
    """Keeps the best state so far and says when nothing is being gained."""

    def __init__(self, soft: Trained, objective: Objective, patience: int | None) -> None:
        self.soft, self.objective, self.patience = soft, objective, patience
        self.initial = self.latest = self._losses()
        self.first = self.best = self.last
        self.state = soft.snapshot()
        self.stale = 0

    @torch.no_grad()
    def _losses(self) -> Tensor:
        return self.objective.judge().double()

    @property
    def last(self) -> float:
        """Loss of the state last looked at."""
        return float(self.latest.mean())

    @property
    def harmless(self) -> bool:
        """Whether nothing shows that the state last looked at is worse than the initial one."""
        difference = self.latest - self.initial
        error = float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
        return float(difference.mean()) < error

    def look(self) -> bool:
        """Judge the state; True when the last looks brought nothing."""
        self.latest = self._losses()
        loss = self.last
        self.stale += 1
        if loss < self.best:
            if loss < 0.998 * self.best:
                self.stale = 0
            self.best, self.state = loss, self.soft.snapshot()
        return self.patience is not None and self.stale >= self.patience


@torch.enable_grad()
def descend(
    soft: Trained,
    groups: list[dict[str, Any]],
    objective: Objective,
    schedule: Schedule,
    generator: torch.Generator,
    *,
    tick: Callable[[int], None] | None = None,
) -> Outcome:
    """Train what is free in a unit, in place.

    Parameters
    ----------
    soft : Trained
        A unit, the whole model, or what else is trained.
    groups : list of dict
        Adam's parameter groups with the initial rates.
    objective : Objective
        The loss.
    schedule : Schedule
        How long.
    generator : torch.Generator
        CPU generator of the order of the rows.
    tick : callable or None
        Called with the number of each finished step.

    Returns
    -------
    Outcome
        The best state on the rows held out, or the last, is kept and written into the modules.  If neither may be, or the
        loss turns NaN, the initial values are kept, and the note says so.
    """
    with freed_memory_kept():  # a step frees all that the next one needs
        return _descend(soft, groups, objective, schedule, generator, tick)


def _descend(
    soft: Trained,
    groups: list[dict[str, Any]],
    objective: Objective,
    schedule: Schedule,
    generator: torch.Generator,
    tick: Callable[[int], None] | None,
) -> Outcome:
    initial = soft.state()
    judge = _Judge(soft, objective, None if soft.relaxed else schedule.patience)
    # rounding that is relaxed while it is trained is that of integers only at the end
    every = schedule.steps if soft.relaxed else max(schedule.steps // schedule.looks, 1)
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), foreach=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    # what is relaxed is pulled to integers in time, with all that adapts to them: for that no rate may have fallen
    held = HELD if soft.relaxed else 0.0
    order = torch.empty(0, dtype=torch.long)
    batch = min(schedule.batch_size, objective.count)
    step = done = 0
    while step < schedule.steps:
        if len(order) < batch:
            order = torch.randperm(objective.count, generator=generator)
        rows, order = order[:batch], order[batch:]
        share = step / schedule.steps
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1.0 + math.cos(math.pi * max(share - held, 0.0) / (1.0 - held)))
        optimizer.zero_grad()
        total = 0.0
        for index, loss in enumerate(objective.losses(rows)):
            if index == 0:
                for term in soft.regularizers(share):
                    loss = loss + term
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if not math.isfinite(total):
            soft.restore(initial)
            return Outcome(
                judge.first, judge.first, done, "the loss became NaN or infinite: initial values kept"
            )
        optimizer.step()
        step, done = step + 1, done + 1
        if tick is not None:
            tick(done)
        if (step % every == 0 or step == schedule.steps) and judge.look():
            step = max(step, round(_END * schedule.steps))
    after = judge.last
    if not (schedule.keeps_last and judge.harmless):
        if not judge.best < judge.first:
            soft.restore(initial)
            return Outcome(judge.first, judge.first, done, "training did not improve it: initial values kept")
        soft.load(judge.state)
        after = judge.best
    soft.harden()
    return Outcome(judge.first, after, done)
