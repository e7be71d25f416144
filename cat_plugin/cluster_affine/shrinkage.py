"""Hierarchical shrinkage: a cluster's map towards the global one, the global one towards a prior.

Both strengths are chosen by generalised cross-validation, which for these smoothers has a closed form once the
second moments are diagonalised: no row is looked at twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from cat_plugin.cluster_affine._typing import FloatArray

__all__ = ["Moments", "ShrunkMaps", "shrink"]

#: Strengths tried, relative to the average variance (global) or in rows' worth of evidence (cluster).
GLOBAL_STRENGTHS: Final = np.concatenate([[1e-9], np.logspace(-6, 3, 28)])
CLUSTER_STRENGTHS: Final = np.concatenate([np.logspace(-1, 4, 26), [np.inf]])
_NEGLIGIBLE: Final = 1e-12


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments per cluster of regressors x and targets y, with a leading axis of independent problems.

    The full map is one problem with ``D`` regressors and ``C`` targets; the diagonal map is ``C`` problems with
    one regressor and one target each.

    Parameters
    ----------
    count : ndarray of shape (K,)
        Rows of each cluster.
    mean_x : ndarray of shape (B, K, D)
        Means of the regressors.
    mean_y : ndarray of shape (B, K, C)
        Means of the targets.
    xx : ndarray of shape (B, K, D, D)
        Sums of products of regressors about the cluster's means.
    xy : ndarray of shape (B, K, D, C)
        The same of regressors and targets.
    yy : ndarray of shape (B, K, C)
        The same of each target and itself.
    """

    count: FloatArray
    mean_x: FloatArray
    mean_y: FloatArray
    xx: FloatArray
    xy: FloatArray
    yy: FloatArray


@dataclass(frozen=True, eq=False)
class ShrunkMaps:
    """Maps ``y = x @ weight_k + offset_k`` and the strengths that were chosen for them.

    Parameters
    ----------
    weight : ndarray of shape (B, K, D, C)
        Slopes.
    offset : ndarray of shape (B, K, C)
        What is added.
    global_strength : float
        Ridge of the global map towards its prior, relative to the average variance of the regressors.
    cluster_strength : float
        Rows' worth of evidence with which a cluster is held to the global map; infinity: it is that map.
    """

    weight: FloatArray
    offset: FloatArray
    global_strength: float
    cluster_strength: float


def _about_global(moments: Moments) -> tuple[FloatArray, ...]:
    n = moments.count
    total = max(float(n.sum()), 1.0)
    anchor = int(np.argmax(n))
    mean_x = moments.mean_x[:, anchor] + np.einsum(
        "k,bkd->bd", n / total, moments.mean_x - moments.mean_x[:, anchor, None]
    )
    mean_y = moments.mean_y[:, anchor] + np.einsum(
        "k,bkc->bc", n / total, moments.mean_y - moments.mean_y[:, anchor, None]
    )
    used = (n > 0)[None, :, None]
    dx = np.where(used, moments.mean_x - mean_x[:, None], 0.0)
    dy = np.where(used, moments.mean_y - mean_y[:, None], 0.0)
    ndx = n[None, :, None] * dx
    xx = moments.xx + ndx[..., :, None] * dx[..., None, :]
    xy = moments.xy + ndx[..., :, None] * dy[..., None, :]
    yy = moments.yy + n[None, :, None] * dy**2
    return mean_x, mean_y, dx, dy, xx, xy, yy


def _ridge(
    xx: FloatArray, xy: FloatArray, yy: FloatArray, prior: FloatArray, rows: float
) -> tuple[FloatArray, FloatArray, FloatArray, float, float]:
    """Global map by ridge towards the prior; also the axes, variances, degrees of freedom and strength."""
    cross = xy - xx @ prior
    energy = np.maximum(yy - 2 * (prior * xy).sum(1) + (prior * (xx @ prior)).sum(1), 0.0)
    values, axes = np.linalg.eigh(xx)
    values = np.maximum(values, 0.0)
    scale = values.mean(axis=1, keepdims=True)
    # Regressors that do not vary say nothing; any scale will do for them.
    scale = np.where(scale > 1e-290, scale, 1.0)
    kept = values > _NEGLIGIBLE * scale
    rotated = np.swapaxes(axes, 1, 2) @ cross
    power = (rotated**2).sum(axis=2) * kept
    strengths = GLOBAL_STRENGTHS[:, None, None] * scale
    damped = values + strengths
    gain = (power * (values / damped**2 - 2.0 / damped)).sum(axis=(1, 2))
    freedom = 1.0 + (kept * values / damped).sum(axis=2).mean(axis=1)
    error = np.maximum(energy.sum() + gain, 0.0)
    score = _score(error, freedom, rows, energy.sum())
    best = len(score) - 1 - int(np.argmin(score[::-1]))
    inverse = kept / (values + GLOBAL_STRENGTHS[best] * scale)
    weight = prior + axes @ (inverse[..., None] * rotated)
    whiten = axes * np.where(kept, 1.0 / np.sqrt(np.where(kept, values / rows, 1.0)), 0.0)[:, None, :]
    return weight, whiten, values, float(freedom[best]), float(GLOBAL_STRENGTHS[best])


def _score(error: FloatArray, freedom: FloatArray, rows: float, energy: float) -> FloatArray:
    """Generalised cross-validation; infinite where nothing would be left to judge the fit by."""
    left = rows - freedom
    # An exact fit has no error to speak of: what rounding left must not decide between strengths.
    floor = 1e-24 * max(energy, np.finfo(np.float64).tiny)
    return np.where(left > 0.5, np.maximum(error, floor) / np.maximum(left, 0.5) ** 2, np.inf)


def shrink(moments: Moments, prior: FloatArray) -> ShrunkMaps:
    """Fit one map per cluster, shrunk to the global map, which is shrunk to the prior.

    The global map minimises ``|y - x W|^2 + lambda |W - prior|^2``; a cluster's correction to it, in coordinates
    in which the regressors are white, is a ridge regression of its residuals with strength tau: its prior carries
    the weight of tau rows.  Both strengths minimise generalised cross-validation.

    Parameters
    ----------
    moments : Moments
        Of the rows to fit to.
    prior : ndarray of shape (B, D, C)
        Map assumed where the data say nothing; the identity, for logits.

    Returns
    -------
    ShrunkMaps

    References
    ----------
    G. H. Golub, M. Heath, G. Wahba, "Generalized cross-validation as a method for choosing a good ridge
    parameter", Technometrics 21 (1979).
    """
    n, rows = moments.count, max(float(moments.count.sum()), 1.0)
    mean_x, mean_y, dx, dy, xx, xy, yy = _about_global(moments)
    weight, whiten, _, freedom, strength = _ridge(xx.sum(1), xy.sum(1), yy.sum(1), prior, rows)
    clusters = n.shape[0]
    if clusters == 1:
        offset = mean_y - np.einsum("bd,bdc->bc", mean_x, weight)
        return ShrunkMaps(weight[:, None], offset[:, None], strength, np.inf)

    # Residuals of the global map, against white regressors and a constant.
    white = np.swapaxes(whiten, 1, 2)[:, None]
    problems, width = xx.shape[0], xx.shape[2]
    moment = np.empty((problems, clusters, width + 1, width + 1))
    moment[..., :width, :width] = white @ xx @ whiten[:, None]
    moment[..., :width, width] = n[None, :, None] * (white @ dx[..., None])[..., 0]
    moment[..., width, :width] = moment[..., :width, width]
    moment[..., width, width] = n
    cross = np.empty((problems, clusters, width + 1, xy.shape[3]))
    cross[..., :width, :] = white @ (xy - xx @ weight[:, None])
    cross[..., width, :] = n[None, :, None] * (dy - (dx[..., None, :] @ weight[:, None])[..., 0, :])
    energy = float(
        (yy - 2 * (weight[:, None] * xy).sum(2) + (weight[:, None] * (xx @ weight[:, None])).sum(2)).sum()
    )

    values, axes = np.linalg.eigh(moment)
    values = np.maximum(values, 0.0)
    rotated = np.swapaxes(axes, 2, 3) @ cross
    power = (rotated**2).sum(axis=3)
    finite = CLUSTER_STRENGTHS[:-1, None, None, None]
    damped = values + finite
    gain = (power * (values / damped**2 - 2.0 / damped)).sum(axis=(1, 2, 3))
    extra = (values / damped).sum(axis=(2, 3)).mean(axis=1)
    error = np.maximum(energy + np.concatenate([gain, [0.0]]), 0.0)
    score = _score(error, freedom + np.concatenate([extra, [0.0]]), rows, max(energy, float(yy.sum())))
    best = len(score) - 1 - int(np.argmin(score[::-1]))
    tau = float(CLUSTER_STRENGTHS[best])
    change = np.zeros_like(rotated) if np.isinf(tau) else axes @ (rotated / (values + tau)[..., None])
    weights = weight[:, None] + whiten[:, None] @ change[..., :width, :]
    offset = mean_y[:, None] + change[..., width, :] - np.einsum("bd,bkdc->bkc", mean_x, weights)
    return ShrunkMaps(weights, offset, strength, tau)
