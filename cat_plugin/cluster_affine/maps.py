"""The maps themselves: from statistics and a geometry to the arrays that an op applies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cat_plugin.cluster_affine.parameters import AffineParameters
from cat_plugin.cluster_affine.shrinkage import Moments, shrink
from cat_plugin.cluster_affine.statistics import ClusterStatistics

__all__ = [
    "Geometry",
    "closed_form_diagonal",
    "fit_diagonal",
    "fit_full",
    "fit_lowrank",
    "identity_parameters",
    "paper_parameters",
    "widen",
]

FloatArray = NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class Geometry:
    """Which cluster a row belongs to.

    Parameters
    ----------
    mean : ndarray of shape (P,)
    components : ndarray of shape (d, P)
        ``d = 0``: no projection.
    centroids : ndarray of shape (K, d), or (K, P) without projection
    """

    mean: FloatArray
    components: FloatArray
    centroids: FloatArray


def closed_form_diagonal(statistics: ClusterStatistics) -> tuple[FloatArray, FloatArray]:
    """Least-squares slope and offset per cluster and class, as the paper has them.

    ``gamma = cov(z_q, z_fp) / var(z_q)`` and ``beta = mean(z_fp) - gamma * mean(z_q)``.  An empty cluster
    is the identity; a class that does not vary within its cluster keeps the slope one and gets the mean
    difference as its offset.

    Parameters
    ----------
    statistics : ClusterStatistics

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


def paper_parameters(statistics: ClusterStatistics, geometry: Geometry, alpha: float) -> AffineParameters:
    """Return the paper's correction: the closed form as it is, blended by alpha."""
    gamma, beta = closed_form_diagonal(statistics)
    return AffineParameters("diagonal", alpha, **vars(geometry), gamma=gamma, beta=beta)


def identity_parameters(n_classes: int) -> AffineParameters:
    """Return the correction that corrects nothing."""
    return AffineParameters(
        "diagonal",
        0.0,
        mean=np.zeros(n_classes),
        components=np.zeros((0, n_classes)),
        centroids=np.zeros((1, n_classes)),
        gamma=np.ones((1, n_classes)),
        beta=np.zeros((1, n_classes)),
    )


def _shrunk_diagonal(statistics: ClusterStatistics) -> tuple[FloatArray, FloatArray]:
    """Slope and offset per cluster and class, shrunk to the global ones and those to the identity."""
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


def fit_diagonal(statistics: ClusterStatistics, geometry: Geometry, alpha: float = 1.0) -> AffineParameters:
    """Fit a slope and an offset per cluster and class, with hierarchical shrinkage.

    Parameters
    ----------
    statistics : ClusterStatistics
    geometry : Geometry
    alpha : float, default=1.0
        Blending factor to store with the maps.

    Returns
    -------
    AffineParameters
    """
    gamma, beta = _shrunk_diagonal(statistics)
    return AffineParameters("diagonal", alpha, **vars(geometry), gamma=gamma, beta=beta)


def fit_full(
    statistics: ClusterStatistics, geometry: Geometry, scale: FloatArray, alpha: float = 1.0
) -> AffineParameters:
    """Fit a matrix and an offset per cluster, with hierarchical shrinkage.

    Parameters
    ----------
    statistics : ClusterStatistics
        With the logits and, behind them, the features as regressors, each divided by `scale`.
    geometry : Geometry
    scale : ndarray of shape (P,)
        What the regressors were divided by; one for the logits.
    alpha : float, default=1.0

    Returns
    -------
    AffineParameters
    """
    classes = statistics.mean_fp.shape[1]
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
    return AffineParameters("full", alpha, **vars(geometry), weight=weight, beta=maps.offset[0])


def fit_lowrank(
    statistics: ClusterStatistics, geometry: Geometry, rank: int, alpha: float = 1.0
) -> AffineParameters:
    """Fit the diagonal map, then a low-rank one in principal components to what it leaves.

    Parameters
    ----------
    statistics : ClusterStatistics
        With the projection of the logits as regressors.
    geometry : Geometry
        Its components made that projection.
    rank : int
        Rank r of the part that the clusters share.
    alpha : float, default=1.0

    Returns
    -------
    AffineParameters

    References
    ----------
    A. J. Izenman, "Reduced-rank regression for the multivariate linear model", J. Multivariate Analysis 5 (1975).
    """
    gamma, beta = _shrunk_diagonal(statistics)
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
    # The directions in which the maps move the logits most, over the rows they were fitted on.
    pooled = statistics.xx.sum(axis=0)
    factor = np.linalg.cholesky(pooled + 1e-12 * max(float(np.trace(pooled)), 1e-300) * np.eye(width))
    average = np.einsum("k,kdc->dc", statistics.count / max(statistics.n_rows, 1.0), weight)
    right = np.linalg.svd(factor.T @ average, full_matrices=False)[2][: min(rank, width, classes)]
    return AffineParameters(
        "lowrank",
        alpha,
        **vars(geometry),
        gamma=gamma,
        beta=beta + offset,
        core=weight @ right.T,
        right=right,
    )


def widen(parameters: AffineParameters, n_features: int) -> AffineParameters:
    """Write any correction as a full one that also takes features, without changing what it does.

    Parameters
    ----------
    parameters : AffineParameters
    n_features : int
        Number of feature columns that follow the logits.

    Returns
    -------
    AffineParameters
        Of mode ``full``.
    """
    classes, given = parameters.n_classes, parameters.mean.shape[0]
    missing = classes + n_features - given
    if parameters.mode == "full" and missing == 0:
        return parameters
    components = parameters.components if parameters.components.shape[0] else np.eye(given)
    mean = parameters.mean if parameters.components.shape[0] else np.zeros(given)
    beta = parameters.beta
    if parameters.weight is not None:
        weight = parameters.weight
    else:
        assert parameters.gamma is not None
        weight = parameters.gamma[:, :, None] * np.eye(classes)
        if parameters.core is not None and parameters.right is not None:
            change = (components.T @ parameters.core) @ parameters.right
            weight = weight + np.swapaxes(change, 1, 2)
            beta = beta - mean @ change
    return AffineParameters(
        "full",
        parameters.alpha,
        mean=np.pad(mean, (0, missing)),
        components=np.pad(components, ((0, 0), (0, missing))),
        centroids=parameters.centroids,
        beta=beta,
        weight=np.pad(weight, ((0, 0), (0, 0), (0, missing))),
    )
