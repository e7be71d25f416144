"""The published method to the letter."""

from __future__ import annotations

import numpy as np

from cat_plugin.cluster_affine._typing import FloatArray
from cat_plugin.cluster_affine.families.diagonal import DIAGONAL
from cat_plugin.cluster_affine.families.family import Budget, Candidate, Family, Problem
from cat_plugin.cluster_affine.geometry import Geometry
from cat_plugin.cluster_affine.statistics import ClusterStatistics

__all__ = ["Paper", "closed_form"]


def closed_form(statistics: ClusterStatistics) -> tuple[FloatArray, FloatArray]:
    """Least-squares slope and offset per cluster and class, as the paper has them.

    ``gamma = cov(z_q, z_fp) / var(z_q)`` and ``beta = mean(z_fp) - gamma * mean(z_q)``.  An empty cluster
    is the identity; a class that does not vary within its cluster keeps the slope one and gets the mean
    difference as its offset.

    Parameters
    ----------
    statistics : ClusterStatistics
        Without regressors.

    Returns
    -------
    gamma, beta : ndarray of shape (K, C)

    References
    ----------
    arXiv:2509.26277, the closed-form solution for gamma and beta.
    """
    count, mean_q, mean_fp = statistics.count, statistics.mean_q, statistics.mean_fp
    # Rounding leaves a residue of this size where the values of a cluster are all the same.
    residue = count[:, None] * (8.0 * np.finfo(np.float64).eps * np.abs(mean_q)) ** 2
    gamma = np.ones_like(mean_q)
    np.divide(statistics.qf, statistics.qq, out=gamma, where=statistics.qq > residue)
    beta = mean_fp - gamma * mean_q
    empty = count == 0
    gamma[empty] = 1.0
    beta[empty] = 0.0
    return gamma, beta


class Paper(Family):
    """A slope and an offset per cluster and class in closed form, blended by a constant alpha.

    References
    ----------
    "CAT: Post-Training Quantization Error Reduction via Cluster-based Affine Transformation", arXiv:2509.26277.
    """

    name = "paper"
    map = DIAGONAL
    precedence = 1
    # k-means sees the rows as they came.
    sorts_rows = False
    n_init = 3

    def candidates(self, budget: Budget) -> list[Candidate]:
        """Return the method with the user's settings."""
        return [Candidate(self.name, budget.n_clusters, budget.n_components, float(budget.alpha))]

    def fit(self, problem: Problem, statistics: ClusterStatistics) -> tuple[Geometry, dict[str, FloatArray]]:
        """Return the closed form as it is."""
        gamma, beta = closed_form(statistics)
        return problem.geometry, {"gamma": gamma, "beta": beta}
