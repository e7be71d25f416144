"""Everything that several candidates derive from the rows at hand, derived once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cat_plugin.cluster_affine._typing import FloatArray
from cat_plugin.cluster_affine.clustering import principal_axes, seek_centroids
from cat_plugin.cluster_affine.families import FAMILIES, Candidate, Problem
from cat_plugin.cluster_affine.geometry import Geometry, project
from cat_plugin.cluster_affine.parameters import AffineParameters
from cat_plugin.cluster_affine.rows import Rows, Scaling
from cat_plugin.cluster_affine.statistics import ClusterStatistics, StatisticsAccumulator

__all__ = ["Workbench", "collect", "collector"]


def collector(problem: Problem) -> StatisticsAccumulator:
    """Return an empty accumulator for what the problem's map needs."""
    width = FAMILIES[problem.candidate.family].n_regressors(problem)
    return StatisticsAccumulator(problem.geometry.n_clusters, problem.geometry.mean.shape[0], width)


def collect(into: StatisticsAccumulator, problem: Problem, batch: Rows) -> None:
    """Collect from a batch what the problem's map needs."""
    position, label = problem.geometry.assign(batch.z_q)
    columns = FAMILIES[problem.candidate.family].regressors(problem, batch, position)
    into.add(batch.z_q, batch.z_fp, label, columns)


@dataclass(eq=False)
class Workbench:
    """Fit candidates to the same rows, sharing projections, clusters and statistics between them.

    Parameters
    ----------
    rows : Rows
        What to fit to.
    seed : int
        Seed of k-means.
    temperature_unit : float
        Spread of the full-precision logits, the unit of temperatures.
    n_init : int, default=1
        Initialisations of k-means.
    """

    rows: Rows
    seed: int
    temperature_unit: float
    n_init: int = 1
    scaling: Scaling = field(init=False)
    _axes: dict[int, FloatArray] = field(default_factory=dict, init=False)
    _geometries: dict[tuple[int, int | None], Geometry] = field(default_factory=dict, init=False)
    _statistics: dict[tuple[Any, ...], ClusterStatistics] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Measure the columns."""
        self.scaling = Scaling.of(self.rows)

    def axes(self, count: int) -> FloatArray:
        """Return the leading principal axes of the logits."""
        if count not in self._axes:
            longest = max(self._axes, default=0)
            if longest >= count:
                self._axes[count] = self._axes[longest][:count]
            else:
                centre = self.scaling.mean[: self.rows.z_q.shape[1]]
                self._axes[count] = principal_axes(self.rows.z_q - centre, count)
        return self._axes[count]

    def geometry(self, n_clusters: int, n_components: int | None) -> Geometry:
        """Return the clusters."""
        key = (n_clusters, n_components)
        if key not in self._geometries:
            classes = self.rows.z_q.shape[1]
            mean = self.scaling.mean[:classes]
            components = np.zeros((0, classes)) if n_components is None else self.axes(n_components)
            position = project(self.rows.z_q, mean, components)
            centroids = seek_centroids(position, n_clusters, self.seed, self.n_init)
            self._geometries[key] = Geometry(mean, components, centroids)
        return self._geometries[key]

    def problem(self, candidate: Candidate, geometry: Geometry | None = None) -> Problem:
        """Return what a fit of the candidate starts from, with the clusters found here or with others."""
        geometry = geometry or self.geometry(candidate.n_clusters, candidate.n_components)
        return Problem(candidate, geometry, self.scaling, self.rows.n_features)

    def fit(self, candidate: Candidate) -> AffineParameters:
        """Fit a candidate to the rows."""
        problem = self.problem(candidate)
        # Families without regressors share their statistics.
        layout = candidate.family if FAMILIES[candidate.family].n_regressors(problem) else ""
        key = (candidate.n_clusters, candidate.n_components, layout, candidate.use_features)
        if key not in self._statistics:
            accumulator = collector(problem)
            collect(accumulator, problem, self.rows)
            self._statistics[key] = accumulator.result()
        return self.build(problem, self._statistics[key])

    def build(self, problem: Problem, statistics: ClusterStatistics) -> AffineParameters:
        """Turn statistics, of these rows or of more, into parameters for rows with features as these have."""
        family = FAMILIES[problem.candidate.family]
        placed, arrays = family.fit(problem, statistics)
        made = AffineParameters(family.map.mode, problem.candidate.alpha, **vars(placed), **arrays)
        made = family.refine(problem, made, self.rows, self.temperature_unit)
        return made.widened(problem.n_features) if problem.n_features else made
