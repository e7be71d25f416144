"""The host's ``autotune`` over configurations of CAT: each tried once, by CAT's criterion, with one table at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from neural_compressor.common.base_config import BaseConfig
from neural_compressor.common.base_tuning import TuningMonitor
from neural_compressor.common.utils import logger as host_logger

from cat_plugin.correction import CorrectedModule
from cat_plugin.hosts.inc3.config import CATConfig
from cat_plugin.hosts.pipeline import TuningSession
from cat_plugin.recipe.criteria import Criterion
from cat_plugin.recipe.tuning import TuningRun

__all__ = ["init_tuning_with_cat"]


class _Monitor(TuningMonitor):  # type: ignore[misc]
    """The host's record of trials, with CAT's criterion, time limit and table."""

    def __init__(self, tuning_config: Any, run: TuningRun, total: int, session: TuningSession) -> None:
        super().__init__(tuning_config)
        self._run = run
        self._total = total
        self._session = session
        self._best: CorrectedModule | None = None
        session.label = f"trial 1/{total}"

    def set_baseline(self, baseline: float) -> None:
        super().set_baseline(baseline)
        self._run.started(baseline)

    def add_trial_result(self, trial_index: int, trial_result: float, quant_config: BaseConfig) -> None:
        super().add_trial_result(trial_index, trial_result, quant_config)
        self._run.add(quant_config.to_dict(), trial_result)
        if self._run.best() == len(self._run.trials) - 1:
            self._best = self._session.last
        self._session.last = None
        self._session.label = f"trial {self.trial_cnt + 1}/{self._total}"

    def _print_trial_results_table(self, trial_index: int, trial_result: float) -> None:
        """Nothing: one table of all trials follows at the end."""

    def need_stop(self) -> bool:
        stop = self.trial_cnt >= self._total or self._run.done()
        if stop:
            self._session.label, self._session.winner = "the best trial again", self._best
            for line in self._run.table().splitlines():
                host_logger.info(line)
        return stop

    def get_best_trial_record(self) -> Any:
        return self.tuning_history[self._run.best()]


def init_tuning_with_cat(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the host's ``init_tuning``: where CAT is among the configurations, its monitor and session are used."""

    def init_tuning(tuning_config: Any) -> Any:
        given = (
            tuning_config.config_set
            if isinstance(tuning_config.config_set, list)
            else [tuning_config.config_set]
        )
        if not any(isinstance(config, CATConfig) for config in given):
            return original(tuning_config)
        # The host lowers this number in the caller's object, from 3.7 on.
        asked = tuning_config.max_trials
        loader, logger, _ = original(tuning_config)
        tuning_config.max_trials = asked
        session = TuningSession()
        distinct: list[BaseConfig] = []
        for config in loader.config_set.config_list:
            if isinstance(config, CATConfig):
                config._session = session
            if not any(config == other for other in distinct):
                distinct.append(config)
        run = getattr(tuning_config, "cat_run", None) or TuningRun(
            Criterion(tolerance=tuning_config.tolerable_loss, max_trials=asked)
        )
        return (
            loader,
            logger,
            _Monitor(tuning_config, run, min(run.criterion.max_trials, len(distinct)), session),
        )

    return init_tuning
