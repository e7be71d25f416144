"""The record of a tuning run, the same for every host."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cat_plugin.errors import CATError, CATTypeError, CATValueError
from cat_plugin.recipe.criteria import Clock, Criterion, Trial, trial_table

if TYPE_CHECKING:
    from torch import nn

__all__ = ["TuningRun"]

_log = logging.getLogger("cat_plugin")


def _number(score: Any) -> float:
    """What an evaluation function returned, as a number."""
    try:
        return float(score)
    except (TypeError, ValueError, RuntimeError):
        raise CATTypeError(
            f"eval_fn returned a {type(score).__name__}; expected one number, such as the accuracy"
        ) from None


class TuningRun:
    """Trials as they come in, judged by one criterion.

    Parameters
    ----------
    criterion : Criterion
        What is good enough, and when to stop.
    keep_models : bool
        Whether each trial keeps its model.

    Attributes
    ----------
    trials : list of Trial
        Those that have ended, in their order.
    baseline : float or None
        Score of the full-precision model.
    best_model : torch.nn.Module or None
        Model of the best trial so far, when the evaluation function is watched.
    """

    def __init__(self, criterion: Criterion, keep_models: bool = False) -> None:
        self.criterion = criterion
        self.keep_models = keep_models
        self.trials: list[Trial] = []
        self.baseline: float | None = None
        self._clock = Clock()
        self._model: nn.Module | None = None
        self.best_model: nn.Module | None = None

    def watch(self, eval_fn: Callable[..., Any]) -> Callable[..., float]:
        """The evaluation function, remembering the model it was last given and checking what it returns."""

        def evaluate(model: nn.Module, *args: Any) -> float:
            self._model = model
            try:
                score = eval_fn(model, *args)
            except CATError:
                raise
            except Exception as error:
                raise CATValueError(
                    f"eval_fn raised {type(error).__name__}: {error}; it is given a model alone and expected to return one "
                    "number, of the full-precision model too"
                ) from error
            return _number(score)

        return evaluate

    def started(self, baseline: float) -> None:
        """The full-precision model was evaluated."""
        baseline = _number(baseline)
        if baseline != baseline:
            raise CATValueError(
                "eval_fn returned NaN for the full-precision model, with which no trial can be compared; check its data "
                "and the model"
            )
        self.baseline = baseline
        self._model = None
        self._clock.lap()

    def add(self, config: dict[str, Any], score: float) -> Trial:
        """A trial was evaluated."""
        score = _number(score)
        met = self.baseline is not None and self.criterion.met(self.baseline, score)
        model = self._model if self.keep_models else None
        trial = Trial(config, score, self._clock.lap(), met, model)
        self.trials.append(trial)
        if self.best() == len(self.trials) - 1:
            self.best_model = self._model
        self._model = None
        return trial

    def done(self) -> bool:
        """Whether to stop after the last trial."""
        if len(self.trials) >= self.criterion.max_trials:
            return True
        if self.criterion.timeout and self._clock.elapsed() >= self.criterion.timeout:
            _log.info("stopped after %.0f s, the time limit", self._clock.elapsed())
            return True
        return not self.criterion.try_all and bool(self.trials) and self.trials[-1].met

    def best(self) -> int:
        """Index of the best trial, the earlier one of equals."""
        best = 0
        for number, trial in enumerate(self.trials):
            if self.criterion.better(trial.score, self.trials[best].score):
                best = number
        return best

    def table(self) -> str:
        """The trials as plain text."""
        return trial_table(self.trials, self.baseline, self.criterion)
