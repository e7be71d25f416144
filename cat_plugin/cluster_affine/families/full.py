"""A matrix and an offset per cluster, from the logits and, where there are any, the features."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from cat_plugin.cluster_affine._typing import FloatArray
from cat_plugin.cluster_affine.families.family import AffineMap, Budget, Candidate, Family, Problem, Terms
from cat_plugin.cluster_affine.geometry import Geometry
from cat_plugin.cluster_affine.refinement import refine_full
from cat_plugin.cluster_affine.rows import Rows
from cat_plugin.cluster_affine.shrinkage import Moments, shrink
from cat_plugin.cluster_affine.statistics import ClusterStatistics

if TYPE_CHECKING:
    from cat_plugin.cluster_affine.parameters import AffineParameters

__all__ = ["FULL", "Full"]

_REFINE_COLUMNS: Final = 512

#: ``z + alpha * (weight_k @ x + beta_k - z)`` with ``x`` the logits followed by the features
FULL = AffineMap(
    mode="full",
    op="cluster_affine_full",
    shapes={"weight": "KCP", "beta": "KC"},
    terms=lambda arrays: Terms(arrays["beta"], matrix=arrays["weight"].transpose(0, 2, 1)),
    takes_features=True,
)


class Full(Family):
    """Matrices with hierarchical shrinkage; some candidates are refined by divergence afterwards."""

    name = "full"
    map = FULL
    precedence = 3

    def candidates(self, budget: Budget) -> list[Candidate]:
        """Return least-squares and refined maps, where a matrix per cluster is affordable."""
        if not budget.takes_matrices:
            return []
        classes, width = budget.n_classes, budget.n_columns
        made = [
            Candidate(self.name, k, d, a)
            for d, k in budget.clusterings(max(16, classes // 2), most=32)
            for a in budget.alphas
        ]
        for k in budget.cluster_counts(max(32, classes), most=8):
            if (k + 1) * (width + 1) > _REFINE_COLUMNS or k == 2:
                continue
            made += [
                Candidate(self.name, k, budget.axes[0], 1.0, temperature=temperature, strength=strength)
                for temperature in (0.25, 0.5)
                for strength in (3e-3, 2e-2)
            ]
        if budget.n_features:
            made += [replace(candidate, use_features=False) for candidate in made]
        return made

    def n_regressors(self, problem: Problem) -> int:
        """Return the number of logits and features."""
        return len(self._scale(problem))

    def regressors(self, problem: Problem, rows: Rows, position: FloatArray) -> FloatArray:
        """Return the logits and, in their units, the features."""
        if rows.features is None or not problem.candidate.use_features:
            return rows.z_q
        scaled = rows.features / problem.scaling.scale[rows.z_q.shape[1] :]
        return np.concatenate([rows.z_q, scaled], axis=1)

    def fit(self, problem: Problem, statistics: ClusterStatistics) -> tuple[Geometry, dict[str, FloatArray]]:
        """Return the shrunk matrices and offsets."""
        classes = statistics.mean_fp.shape[1]
        scale, geometry = self._scale(problem), problem.geometry
        if len(scale) > classes:
            # The clusters are those of the logits; the features are regressors only.
            geometry = geometry.widened(problem.n_features)
        prior = np.zeros((1, scale.shape[0], classes))
        prior[0, :classes, :classes] = np.eye(classes)
        moments = Moments(
            statistics.count,
            statistics.mean_x[None],
            statistics.mean_fp[None],
            statistics.xx[None],
            statistics.xf[None],
            statistics.ff[None],
        )
        maps = shrink(moments, prior)
        weight = np.swapaxes(maps.weight[0], 1, 2) / scale
        return geometry, {"weight": weight, "beta": maps.offset[0]}

    def refine(
        self, problem: Problem, fitted: AffineParameters, rows: Rows, temperature_unit: float
    ) -> AffineParameters:
        """Move the maps to the least divergence, for candidates with a temperature."""
        candidate = problem.candidate
        if not candidate.temperature:
            return fitted
        inputs, scale = rows.inputs(candidate.use_features), self._scale(problem)
        temperature = candidate.temperature * temperature_unit
        return refine_full(fitted, inputs, rows.z_fp, scale, temperature, candidate.strength)

    @staticmethod
    def _scale(problem: Problem) -> FloatArray:
        """Size of each regressor: one for the logits."""
        scale, classes = problem.scaling.scale, problem.geometry.mean.shape[0]
        return scale if problem.candidate.use_features else scale[:classes]
