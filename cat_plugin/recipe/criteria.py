"""When a trial is good enough, which of two is better, and when to stop trying."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cat_plugin.errors import RecipeError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Clock", "Criterion", "Trial", "trial_table"]


@dataclass(frozen=True)
class Criterion:
    """What a tuning run aims at and how long it may take.

    ::

        tuning:
          accuracy_criterion: {relative: 0.01}
          exit_policy: {max_trials: 10, timeout: 0}

    Parameters
    ----------
    tolerance : float
        How much worse than the full-precision model a trial may be.
    relative : bool
        Whether `tolerance` is a share of the full-precision score, or in the score's own unit.
    higher_is_better : bool
        Whether the score is to be large (accuracy) or small (loss).
    timeout : float
        Seconds after which no further trial starts; 0 for no limit.
    max_trials : int
        Trials at most.
    try_all : bool
        Go on after a trial meets the criterion, and return the best of all.

    Raises
    ------
    RecipeError
        On limits that let nothing start.
    """

    tolerance: float = 0.01
    relative: bool = True
    higher_is_better: bool = True
    timeout: float = 0.0
    max_trials: int = 100
    try_all: bool = False

    def __post_init__(self) -> None:
        if self.timeout < 0:
            raise RecipeError(f"timeout is {self.timeout}; expected seconds, or 0 for no limit")
        if self.max_trials < 1:
            raise RecipeError(f"max_trials is {self.max_trials}; expected 1 or more")

    def target(self, baseline: float) -> float:
        """The worst score that is still good enough."""
        loss = self.tolerance * abs(baseline) if self.relative else self.tolerance
        return baseline - loss if self.higher_is_better else baseline + loss

    def met(self, baseline: float, score: float) -> bool:
        """Whether a score is good enough."""
        target = self.target(baseline)
        return score >= target if self.higher_is_better else score <= target

    def better(self, score: float, than: float) -> bool:
        """Whether one score is strictly better than another; NaN is never better."""
        if than != than:
            return score == score
        return score > than if self.higher_is_better else score < than


@dataclass
class Trial:
    """One trial of a tuning run.

    Attributes
    ----------
    config : dict
        The configuration, without lists.
    score : float
        What the evaluation function returned.
    seconds : float
        Time from the end of the trial before (or the baseline) to the end of this one.
    met : bool
        Whether the score met the criterion.
    model : torch.nn.Module or None
        The quantized and corrected model, when models are kept.
    """

    config: dict[str, Any]
    score: float
    seconds: float
    met: bool
    model: nn.Module | None = field(default=None, repr=False)


class Clock:
    """Seconds since the start and since the last look."""

    def __init__(self) -> None:
        self.start = self._last = time.monotonic()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        return seconds

    def elapsed(self) -> float:
        """Seconds since the clock was made."""
        return time.monotonic() - self.start


def trial_table(trials: list[Trial], baseline: float | None, criterion: Criterion) -> str:
    """The trials as a table of plain text, the best marked with a star."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from cat_plugin.recipe.description import describe

    best = None
    for number, trial in enumerate(trials):
        if best is None or criterion.better(trial.score, trials[best].score):
            best = number
    table = Table(box=None, pad_edge=False)
    for heading in ("trial", "configuration", "score", "criterion", "seconds"):
        table.add_column(
            heading, no_wrap=True, justify="right" if heading in ("score", "seconds") else "left"
        )
    if baseline is not None:
        table.add_row("", "full precision", f"{baseline:.4f}", f"target {criterion.target(baseline):.4f}", "")
    for number, trial in enumerate(trials):
        mark = "*" if number == best else ""
        met = "met" if trial.met else "missed"
        name = escape(describe(trial.config))
        table.add_row(f"{number + 1}{mark}", name, f"{trial.score:.4f}", met, f"{trial.seconds:.1f}")
    # As wide as the table is: a log has no width, and a truncated name says nothing.
    console = Console(file=io.StringIO(), width=10_000, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
