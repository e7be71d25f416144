"""The state of a fit that is fed batch by batch."""

from __future__ import annotations

from copy import deepcopy

from cat_plugin.cluster_affine.fitting import Plan, Settings, make_plan
from cat_plugin.cluster_affine.parameters import AffineParameters
from cat_plugin.cluster_affine.rows import Rows
from cat_plugin.cluster_affine.statistics import StatisticsAccumulator
from cat_plugin.cluster_affine.workbench import collect, collector

__all__ = ["StreamState"]


class StreamState:
    """Rows while they are few, statistics from then on.

    Parameters
    ----------
    settings : Settings
        Of the first batch; later changes of the estimator's parameters do not count.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.n_rows = 0
        self._rows: list[Rows] = []
        self._plan: Plan | None = None
        self._statistics: StatisticsAccumulator | None = None

    def add(self, rows: Rows, limit: int) -> None:
        """Take in a batch; once there are more than `limit` rows, the plan stands."""
        self.n_rows += len(rows)
        if self._plan is not None and self._statistics is not None:
            collect(self._statistics, self._plan.problem(), rows)
            return
        self._rows.append(rows)
        if self.n_rows > limit:
            self._plan = make_plan(self._all_rows(), self.settings)
            problem = self._plan.problem()
            self._statistics = collector(problem)
            collect(self._statistics, problem, self._plan.bench.rows)
            self._rows = []

    def fit(self) -> tuple[AffineParameters, Plan]:
        """Return the fit to all rows so far."""
        if self._plan is None or self._statistics is None:
            plan = make_plan(self._all_rows(), self.settings)
            return plan.fit(), plan
        statistics = deepcopy(self._statistics).result()
        return self._plan.bench.build(self._plan.problem(), statistics), self._plan

    def _all_rows(self) -> Rows:
        self._rows = [Rows.concatenated(self._rows)]
        return self._rows[0]
