"""Rows at hand, and everything that several candidates derive from them, derived once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cat_plugin.cluster_affine.clustering import nearest, principal_axes, project, seek_centroids
from cat_plugin.cluster_affine.maps import (
    Geometry,
    fit_diagonal,
    fit_full,
    fit_lowrank,
    identity_parameters,
    paper_parameters,
    widen,
)
from cat_plugin.cluster_affine.parameters import AffineParameters
from cat_plugin.cluster_affine.refinement import refine_full
from cat_plugin.cluster_affine.statistics import ClusterStatistics

__all__ = ["Candidate", "Rows", "Workbench", "build", "regressors"]

FloatArray = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Candidate:
    """One way to correct logits, before it is fitted.

    Parameters
    ----------
    family : {"identity", "paper", "diagonal", "lowrank", "full"}
        ``paper`` is the closed form without shrinkage; the others shrink.
    n_clusters : int
    n_components : int or None
        Principal components used for clustering (and, for ``lowrank``, for the map); None: the logits themselves.
    alpha : float
    rank : int, default=0
        Rank of the part shared by the clusters (``lowrank``).
    temperature : float, default=0
        Temperature of the refinement by divergence, in units of the logits' spread; 0: least squares alone.
    strength : float, default=0
        How strongly the refinement is held to the least-squares maps.
    tuned_rows : bool, default=True
        Whether rows that the quantizer was tuned on are used for fitting.
    use_features : bool, default=True
        Whether the features are regressors, where there are any (``full``).
    """

    family: str
    n_clusters: int = 1
    n_components: int | None = None
    alpha: float = 1.0
    rank: int = 0
    temperature: float = 0.0
    strength: float = 0.0
    tuned_rows: bool = True
    use_features: bool = True


@dataclass(frozen=True, eq=False)
class Rows:
    """Paired logits, features and what is known about each row.

    Parameters
    ----------
    z_q : ndarray of shape (N, C)
    z_fp : ndarray of shape (N, C)
    features : ndarray of shape (N, F), optional
    tuned : ndarray of shape (N,), bool, optional
    groups : ndarray of shape (N,), optional
    """

    z_q: FloatArray
    z_fp: FloatArray
    features: FloatArray | None = None
    tuned: NDArray[np.bool_] | None = None
    groups: NDArray[Any] | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self.z_q.shape[0])

    @property
    def n_features(self) -> int:
        """Number of feature columns."""
        return 0 if self.features is None else int(self.features.shape[1])

    def take(self, index: NDArray[Any]) -> Rows:
        """Return some of the rows, by index or mask."""
        picked = [None if a is None else a[index] for a in (self.features, self.tuned, self.groups)]
        return Rows(self.z_q[index], self.z_fp[index], *picked)

    def widened(self) -> Rows:
        """Return the rows in float64."""
        wide = [
            None if a is None else a.astype(np.float64, copy=False)
            for a in (self.z_q, self.z_fp, self.features)
        ]
        assert wide[0] is not None
        assert wide[1] is not None
        return Rows(wide[0], wide[1], wide[2], self.tuned, self.groups)

    @classmethod
    def concatenated(cls, parts: list[Rows]) -> Rows:
        """Join parts, none of which or all of which have features, masks and groups."""
        if len(parts) == 1:
            return parts[0]

        def joined(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            return None if values[0] is None else np.concatenate(values)

        return cls(joined("z_q"), joined("z_fp"), joined("features"), joined("tuned"), joined("groups"))

    def inputs(self, use_features: bool = True) -> FloatArray:
        """Return the logits followed by the features."""
        if self.features is None or not use_features:
            return self.z_q
        return np.concatenate([self.z_q, self.features], axis=1)


@dataclass(frozen=True, eq=False)
class Scaling:
    """Centre and size of the columns: features count in the units of the logits."""

    mean: FloatArray
    scale: FloatArray

    @classmethod
    def of(cls, rows: Rows) -> Scaling:
        """Measure them on rows."""
        inputs = rows.inputs()
        mean = inputs[0] + (inputs - inputs[0]).mean(axis=0)
        scale = np.ones(inputs.shape[1])
        if rows.n_features:
            classes = rows.z_q.shape[1]
            power = np.mean((inputs - mean) ** 2, axis=0)
            logits, features = power[:classes].mean(), power[classes:].mean()
            if logits > 0 and features > 0:
                scale[classes:] = np.sqrt(features / logits)
        return cls(mean, scale)


def regressors(
    candidate: Candidate, geometry: Geometry, scaling: Scaling, z_q: FloatArray, features: FloatArray | None
) -> FloatArray | None:
    """Return the columns that the candidate's map is fitted from, beside the logits themselves.

    Returns
    -------
    ndarray of shape (N, D) or None
        None for the diagonal families.
    """
    if candidate.family == "lowrank":
        return project(z_q, geometry.mean, geometry.components)
    if candidate.family == "full":
        if features is None or not candidate.use_features:
            return z_q
        return np.concatenate([z_q, features / scaling.scale[z_q.shape[1] :]], axis=1)
    return None


def build(
    candidate: Candidate,
    geometry: Geometry,
    scaling: Scaling,
    statistics: ClusterStatistics,
    rows: Rows | None,
    temperature_unit: float,
    n_features: int,
) -> AffineParameters:
    """Turn statistics into the candidate's parameters.

    Parameters
    ----------
    candidate : Candidate
    geometry : Geometry
    scaling : Scaling
    statistics : ClusterStatistics
        Collected with that geometry and the candidate's regressors.
    rows : Rows or None
        Rows for the refinement by divergence, for candidates that ask for it.
    temperature_unit : float
        Spread of the full-precision logits.
    n_features : int
        Feature columns that the result has to accept.

    Returns
    -------
    AffineParameters
    """
    classes = statistics.mean_fp.shape[1]
    if candidate.family == "identity":
        made = identity_parameters(classes)
    elif candidate.family == "paper":
        made = paper_parameters(statistics, geometry, candidate.alpha)
    elif candidate.family == "diagonal":
        made = fit_diagonal(statistics, geometry, candidate.alpha)
    elif candidate.family == "lowrank":
        made = fit_lowrank(statistics, geometry, candidate.rank, candidate.alpha)
    else:
        with_features = bool(n_features) and candidate.use_features
        scale = scaling.scale if with_features else scaling.scale[:classes]
        if with_features:
            # The clusters are those of the logits; the features are regressors only.
            padding = ((0, 0), (0, n_features))
            axes = geometry.components if geometry.components.shape[0] else np.eye(classes)
            mean = geometry.mean if geometry.components.shape[0] else np.zeros(classes)
            geometry = Geometry(np.pad(mean, padding[1]), np.pad(axes, padding), geometry.centroids)
        made = fit_full(statistics, geometry, scale, candidate.alpha)
        if candidate.temperature and rows is not None:
            made = refine_full(
                made,
                rows.inputs(candidate.use_features),
                rows.z_fp,
                scale,
                candidate.temperature * temperature_unit,
                candidate.strength,
            )
    return widen(made, n_features) if n_features else made


@dataclass(eq=False)
class Workbench:
    """Fit candidates to the same rows, sharing projections, clusters and statistics between them.

    Parameters
    ----------
    rows : Rows
    seed : int
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
    _maps: dict[Candidate, AffineParameters] = field(default_factory=dict, init=False)

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
        layout = candidate.family if candidate.family in ("full", "lowrank") else "diagonal"
        key = (candidate.n_clusters, candidate.n_components, layout, candidate.use_features)
        if key not in self._statistics:
            rows = self.rows
            label = nearest(project(rows.z_q, geometry.mean, geometry.components), geometry.centroids)
            columns = regressors(candidate, geometry, self.scaling, rows.z_q, rows.features)
            self._statistics[key] = ClusterStatistics.from_rows(
                rows.z_q, rows.z_fp, label, geometry.centroids.shape[0], columns
            )
        return self._statistics[key]

    def fit(self, candidate: Candidate) -> AffineParameters:
        """Fit a candidate."""
        geometry = self.geometry(candidate.n_clusters, candidate.n_components)
        statistics = self.statistics(candidate, geometry)
        return build(
            candidate,
            geometry,
            self.scaling,
            statistics,
            self.rows,
            self.temperature_unit,
            self.rows.n_features,
        )
