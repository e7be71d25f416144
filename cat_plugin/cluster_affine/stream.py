"""The state of a fit that is fed batch by batch."""

from __future__ import annotations

from copy import deepcopy

from cat_plugin.cluster_affine.fitting import Plan, Settings, collect, collector, make_plan
from cat_plugin.cluster_affine.geometry import Geometry
from cat_plugin.cluster_affine.parameters import AffineParameters
from cat_plugin.cluster_affine.rows import Rows
from cat_plugin.cluster_affine.statistics import StatisticsAccumulator

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
            collect(self._statistics, self._plan, self._geometry(self._plan), rows)
            return
        self._rows.append(rows)
        if self.n_rows > limit:
            self._plan = make_plan(self._all_rows(), self.settings)
            geometry = self._geometry(self._plan)
            self._statistics = collector(self._plan, geometry)
            collect(self._statistics, self._plan, geometry, self._plan.bench.rows)
            self._rows = []

    def fit(self) -> tuple[AffineParameters, Plan]:
        """Return the fit to everything seen so far."""
        if self._plan is None or self._statistics is None:
            plan = make_plan(self._all_rows(), self.settings)
            return plan.fit(), plan
        statistics = deepcopy(self._statistics).result()
        geometry = self._geometry(self._plan)
        return self._plan.bench.build(self._plan.candidate, geometry, statistics), self._plan

    def _all_rows(self) -> Rows:
        self._rows = [Rows.concatenated(self._rows)]
        return self._rows[0]

    @staticmethod
    def _geometry(plan: Plan) -> Geometry:
        return plan.bench.geometry(plan.candidate.n_clusters, plan.candidate.n_components)
