"""Progress reports while a model is quantized."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Progress", "Reporter"]

_TELLING = 0.02  # share of all the work from which on its pace says something


@dataclass(frozen=True)
class Progress:
    """One report.

    Attributes
    ----------
    stage : str
        Name of the unit, or of the stage.
    fraction : float
        Share of all the work that is done, 0..1.
    loss_before, loss_after : float or None
        Of the unit just finished; None while it is being trained.
    seconds_left : float or None
        Estimate from the pace so far; None until there is enough of it.
    """

    stage: str
    fraction: float
    loss_before: float | None = None
    loss_after: float | None = None
    seconds_left: float | None = None


class Reporter:
    """Turns work done into reports.

    Parameters
    ----------
    callback : callable or None
        Gets each :class:`Progress`; None is silent.

    Attributes
    ----------
    total : float
        All the work, in units of the caller's choice; may be set once it is known.
    done, skipped : float
        Work of the steps that are finished, and what of it an earlier run has done.
    """

    def __init__(self, callback: Callable[[Progress], None] | None) -> None:
        self.callback = callback
        self.total = 0.0
        self.done = 0.0
        self.skipped = 0.0
        self._within = 0.0
        self.started = time.monotonic()
        self.spoken = self.started

    @property
    def share(self) -> float:
        """Share of all the work that is done, 0..1."""
        return min((self.done + self._within) / self.total, 1.0) if self.total else 0.0

    def enter(self, stage: str) -> None:
        """A stage begins, which may be silent for a while."""
        if self.callback is not None:
            self._report(stage, None, None)

    def skip(self, work: float) -> None:
        """Work that an earlier run has done: it counts as done and says nothing about the pace."""
        self.done += work
        self.skipped += work

    def advance(self, stage: str, work: float) -> None:
        """Part of a step is done; reported at most four times a second."""
        self._within += work
        now = time.monotonic()
        if self.callback is not None and now - self.spoken > 0.25:
            self.spoken = now
            self._report(stage, None, None)

    def finish(self, stage: str, before: float | None, after: float | None, work: float) -> None:
        """A step is done: ``work`` in all, the parts reported by :meth:`advance` included."""
        self.done, self._within = self.done + work, 0.0
        if self.callback is not None:
            self._report(stage, before, after)

    def _report(self, stage: str, before: float | None, after: float | None) -> None:
        assert self.callback is not None
        done = self.done + self._within
        fresh = done - self.skipped
        elapsed = time.monotonic() - self.started
        left = elapsed / fresh * (self.total - done) if fresh > _TELLING * self.total else None
        self.callback(
            Progress(
                stage,
                self.share,
                before,
                after,
                None if left is None else max(left, 0.0),
            )
        )
