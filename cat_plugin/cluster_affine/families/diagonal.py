"""A slope and an offset per cluster and class, shrunk to the global ones and those to the identity."""

from __future__ import annotations

import numpy as np

from cat_plugin.cluster_affine._typing import FloatArray
from cat_plugin.cluster_affine.families.family import AffineMap, Budget, Candidate, Family, Problem, Terms
from cat_plugin.cluster_affine.geometry import Geometry
from cat_plugin.cluster_affine.shrinkage import Moments, shrink
from cat_plugin.cluster_affine.statistics import ClusterStatistics

__all__ = ["DIAGONAL", "Diagonal", "shrunk_diagonal"]

#: ``z + alpha * (gamma_k * z + beta_k - z)``
DIAGONAL = AffineMap(
    mode="diagonal",
    op="cluster_affine",
    shapes={"gamma": "KC", "beta": "KC"},
    terms=lambda arrays: Terms(arrays["beta"], slope=arrays["gamma"]),
)


def shrunk_diagonal(statistics: ClusterStatistics) -> tuple[FloatArray, FloatArray]:
    """Fit a slope and an offset per cluster and class, with hierarchical shrinkage.

    Parameters
    ----------
    statistics : ClusterStatistics
        With or without regressors, which are not read.

    Returns
    -------
    gamma, beta : ndarray of shape (K, C)
    """
    moments = Moments(
        statistics.count,
        statistics.mean_q.T[:, :, None],
        statistics.mean_fp.T[:, :, None],
        statistics.qq.T[:, :, None, None],
        statistics.qf.T[:, :, None, None],
        statistics.ff.T[:, :, None],
    )
    maps = shrink(moments, np.ones((statistics.mean_q.shape[1], 1, 1)))
    return maps.weight[:, :, 0, 0].T, maps.offset[:, :, 0].T


class Diagonal(Family):
    """The paper's map with hierarchical shrinkage."""

    name = "diagonal"
    map = DIAGONAL
    precedence = 2

    def candidates(self, budget: Budget) -> list[Candidate]:
        """Return all numbers of clusters that leave four rows to each."""
        return [Candidate(self.name, k, d, a) for d, k in budget.clusterings(4) for a in budget.alphas]

    def fit(self, problem: Problem, statistics: ClusterStatistics) -> tuple[Geometry, dict[str, FloatArray]]:
        """Return the shrunk slopes and offsets."""
        gamma, beta = shrunk_diagonal(statistics)
        return problem.geometry, {"gamma": gamma, "beta": beta}
