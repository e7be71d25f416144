"""Losses and scores of a run as TensorBoard scalars."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cat_plugin.errors import CATError

if TYPE_CHECKING:
    from cat_plugin.ptq.progress import Progress
    from cat_plugin.recipe.criteria import Trial

__all__ = ["Scalars"]


class Scalars:
    """Writes what happens to an event file.

    Parameters
    ----------
    directory : pathlib.Path
        For ``tensorboard --logdir``.

    Raises
    ------
    CATError
        When TensorBoard is not installed.
    """

    def __init__(self, directory: Path) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise CATError("--tensorboard needs TensorBoard, which is not installed: pip install tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(directory))
        self._units: dict[str, int] = {}

    def unit(self, trial: str, news: Progress) -> None:
        """A unit's losses, numbered as the units come."""
        if news.loss_before is None or news.loss_after is None:
            return
        number = self._units[trial] = self._units.get(trial, 0) + 1
        self._writer.add_scalar(f"{trial}/loss before", news.loss_before, number)
        self._writer.add_scalar(f"{trial}/loss after", news.loss_after, number)

    def trials(self, baseline: float | None, trials: list[Trial]) -> None:
        """The trials' scores; number 0 is the full-precision model."""
        if baseline is not None:
            self._writer.add_scalar("tuning/score", baseline, 0)
        for number, trial in enumerate(trials, 1):
            self._writer.add_scalar("tuning/score", trial.score, number)
            self._writer.add_scalar("tuning/seconds", trial.seconds, number)

    def close(self) -> None:
        """Write everything out."""
        self._writer.close()
