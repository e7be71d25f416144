"""The diagonal map and, for many classes, a low-rank one in principal components."""

from __future__ import annotations

import numpy as np

from cat_plugin.cluster_affine._typing import FloatArray
from cat_plugin.cluster_affine.families.diagonal import shrunk_diagonal
from cat_plugin.cluster_affine.families.family import AffineMap, Budget, Candidate, Family, Problem, Terms
from cat_plugin.cluster_affine.geometry import Geometry
from cat_plugin.cluster_affine.rows import Rows
from cat_plugin.cluster_affine.shrinkage import Moments, shrink
from cat_plugin.cluster_affine.statistics import ClusterStatistics

__all__ = ["LOWRANK", "LowRank"]

#: ``z + alpha * (gamma_k * z + beta_k - z + (p @ core_k) @ right)`` with ``p`` the projection of the row
LOWRANK = AffineMap(
    mode="lowrank",
    op="cluster_affine_lowrank",
    shapes={"gamma": "KC", "beta": "KC", "core": "KDR", "right": "RC"},
    terms=lambda arrays: Terms(
        arrays["beta"], arrays["gamma"], arrays["core"], arrays["right"], projected=True
    ),
)


class LowRank(Family):
    """Fit the diagonal map, then a low-rank one in principal components to what it leaves.

    References
    ----------
    A. J. Izenman, "Reduced-rank regression for the multivariate linear model", J. Multivariate Analysis 5 (1975).
    """

    name = "lowrank"
    map = LOWRANK
    precedence = 4

    def candidate(self, n_clusters: int, n_components: int | None, alpha: float, n_classes: int) -> Candidate:
        """Return the map of the rank of its projection, by default half the classes, at most 50."""
        d = min(n_components or min(50, max(1, n_classes // 2)), n_classes)
        return Candidate(self.name, n_clusters, d, alpha, rank=d)

    def candidates(self, budget: Budget) -> list[Candidate]:
        """Return maps of half and of full rank, where there are many classes."""
        classes = budget.n_classes
        if classes <= 16 and budget.takes_matrices:
            return []
        axes = [classes // 2] if budget.axes[0] is None else [d for d in budget.axes if d is not None]
        return [
            Candidate(self.name, k, d, a, rank=r)
            for d in axes
            if d
            for k in budget.cluster_counts(max(8, d // 2))
            for r in {max(1, d // 2), d}
            for a in budget.alphas
        ]

    def n_regressors(self, problem: Problem) -> int:
        """Return the width of the projection."""
        return int(problem.geometry.centroids.shape[1])

    def regressors(self, problem: Problem, rows: Rows, position: FloatArray) -> FloatArray:
        """Return the projection."""
        return position

    def fit(self, problem: Problem, statistics: ClusterStatistics) -> tuple[Geometry, dict[str, FloatArray]]:
        """Return the shrunk slopes and offsets, each cluster's core and the part that all share."""
        gamma, beta = shrunk_diagonal(statistics)
        left = statistics.mean_fp - gamma * statistics.mean_q - beta
        moments = Moments(
            statistics.count,
            statistics.mean_x[None],
            left[None],
            statistics.xx[None],
            (statistics.xf - statistics.xq * gamma[:, None, :])[None],
            np.maximum(statistics.ff - 2 * gamma * statistics.qf + gamma**2 * statistics.qq, 0.0)[None],
        )
        width, classes = statistics.xf.shape[1:]
        maps = shrink(moments, np.zeros((1, width, classes)))
        weight, offset = maps.weight[0], maps.offset[0]
        right = _directions(weight, statistics.xx, problem.candidate.rank)
        # What the directions leave out is kept where the rows of a cluster are on average.
        kept = np.einsum("kd,kdc->kc", statistics.mean_x, weight)
        return problem.geometry, {
            "gamma": gamma,
            "beta": beta + offset + kept - kept @ right.T @ right,
            "core": weight @ right.T,
            "right": right,
        }


def _directions(weight: FloatArray, xx: FloatArray, rank: int) -> FloatArray:
    """(R, C) orthonormal directions in which maps (K, D, C) move the rows of their clusters most, about these' means.

    `xx` holds the sums (K, D, D) of products of regressors about the means.
    """
    classes = weight.shape[2]
    values, axes = np.linalg.eigh(xx)
    moved = (np.sqrt(np.maximum(values, 0.0))[:, :, None] * (np.swapaxes(axes, 1, 2) @ weight)).reshape(
        -1, classes
    )
    rank = min(rank, len(moved), classes)
    if len(moved) < classes:
        return np.linalg.svd(moved, full_matrices=False)[2][:rank]
    axes_of_classes = np.linalg.eigh(moved.T @ moved)[1].T
    return np.ascontiguousarray(axes_of_classes[::-1][:rank])
