"""Closed-form maps from quantized to full-precision logits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["closed_form_diagonal"]

FloatArray = NDArray[np.floating[Any]]


def closed_form_diagonal(
    count: FloatArray,
    mean_q: FloatArray,
    mean_fp: FloatArray,
    scatter_qq: FloatArray,
    scatter_qf: FloatArray,
) -> tuple[FloatArray, FloatArray]:
    """Least-squares slope and offset per cluster and class, as the paper has them.

    ``gamma = cov(z_q, z_fp) / var(z_q)`` and ``beta = mean(z_fp) - gamma * mean(z_q)``.  An empty cluster
    is the identity; a class that does not vary within its cluster keeps the slope one and gets the mean
    difference as its offset.

    Parameters
    ----------
    count : ndarray of shape (K,)
        Rows in each cluster.
    mean_q, mean_fp : ndarray of shape (K, C)
        Means of the quantized and of the full-precision logits.
    scatter_qq, scatter_qf : ndarray of shape (K, C)
        Centred sums of squares of the quantized logits, and of their products with the full-precision ones.

    Returns
    -------
    gamma, beta : ndarray of shape (K, C)

    References
    ----------
    arXiv:2509.26277, the closed-form solution for gamma and beta.
    """
    # Rounding leaves a residue of this size where the values of a cluster are all the same.
    residue = count[:, None] * (8.0 * np.finfo(np.float64).eps * np.abs(mean_q)) ** 2
    varies = scatter_qq > residue
    gamma = np.ones_like(mean_q)
    np.divide(scatter_qf, scatter_qq, out=gamma, where=varies)
    beta = mean_fp - gamma * mean_q
    empty = count == 0
    gamma[empty] = 1.0
    beta[empty] = 0.0
    return gamma, beta
