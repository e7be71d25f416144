"""Everything that several candidates derive from the rows at hand, derived once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cat_plugin.cluster_affine._typing import FloatArray
from cat_plugin.cluster_affine.clustering import principal_axes, seek_centroids
from cat_plugin.cluster_affine.families import FAMILIES, Candidate
from cat_plugin.cluster_affine.geometry import Geometry, project
from cat_plugin.cluster_affine.parameters import AffineParameters
from cat_plugin.cluster_affine.rows import Rows, Scaling
from cat_plugin.cluster_affine.statistics import ClusterStatistics

__all__ = ["Workbench"]


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

    def statistics(self, candidate: Candidate, geometry: Geometry) -> ClusterStatistics:
        """Return the statistics that the candidate's map needs."""
        family, rows = FAMILIES[candidate.family], self.rows
        # Families without regressors share theirs.
        layout = candidate.family if family.n_regressors(candidate, geometry, rows.n_features) else ""
        key = (candidate.n_clusters, candidate.n_components, layout, candidate.use_features)
        if key not in self._statistics:
            position, label = geometry.assign(rows.z_q)
            columns = family.regressors(candidate, rows, position, self.scaling)
            self._statistics[key] = ClusterStatistics.from_rows(
                rows.z_q, rows.z_fp, label, geometry.n_clusters, columns
            )
        return self._statistics[key]

    def fit(self, candidate: Candidate) -> AffineParameters:
        """Fit a candidate to the rows."""
        geometry = self.geometry(candidate.n_clusters, candidate.n_components)
        return self.build(candidate, geometry, self.statistics(candidate, geometry))

    def build(
        self, candidate: Candidate, geometry: Geometry, statistics: ClusterStatistics
    ) -> AffineParameters:
        """Turn statistics, of these rows or of more, into the candidate's parameters.

        Parameters
        ----------
        candidate : Candidate
            What is to be fitted.
        geometry : Geometry
            Its clusters.
        statistics : ClusterStatistics
            Collected with that geometry and the regressors of the candidate's family.

        Returns
        -------
        AffineParameters
            For rows with as many features as those at hand have.
        """
        family, n_features = FAMILIES[candidate.family], self.rows.n_features
        placed, arrays = family.fit(candidate, statistics, geometry, self.scaling, n_features)
        made = AffineParameters(family.map.mode, candidate.alpha, **vars(placed), **arrays)
        made = family.refine(made, candidate, self.rows, self.scaling, self.temperature_unit)
        return made.widened(n_features) if n_features else made
