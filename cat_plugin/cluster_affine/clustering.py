"""Where a row of logits belongs: the projection, the centroids and the nearest of them."""

from __future__ import annotations

import warnings
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

__all__ = ["NearestCentroid", "nearest", "principal_axes", "project", "seek_centroids"]

FloatArray = NDArray[np.floating[Any]]

_BLOCK_ELEMENTS: Final = 1 << 18


def project(rows: FloatArray, mean: FloatArray, components: FloatArray) -> FloatArray:
    """Project rows onto the principal axes; without axes the rows are returned as they are.

    Parameters
    ----------
    rows : ndarray of shape (N, P)
    mean : ndarray of shape (P,)
    components : ndarray of shape (d, P)
        ``d = 0`` stands for no projection.

    Returns
    -------
    ndarray of shape (N, d), or (N, P) without projection
    """
    if components.shape[0] == 0:
        return rows
    dtype = rows.dtype
    directions, near = components.T.astype(dtype, copy=False), mean.astype(dtype, copy=False)
    # In the rows' precision, but with what rounding takes from the mean put back after the projection.
    lost = (near.astype(mean.dtype) - mean) @ components.T
    projected = np.empty((rows.shape[0], components.shape[0]), dtype=dtype)
    step = max(16, _BLOCK_ELEMENTS // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        # Block by block, so that the centred rows stay in the cache.
        block = slice(start, start + step)
        np.matmul(rows[block] - near, directions, out=projected[block])
    projected += lost.astype(dtype, copy=False)
    return projected


def nearest(position: FloatArray, centroids: FloatArray) -> NDArray[np.intp]:
    """Return the nearest centroid of each row, the lowest index where several are equally near.

    Parameters
    ----------
    position : ndarray of shape (N, D)
    centroids : ndarray of shape (K, d') with d' <= D
        Only the first ``d'`` coordinates of `position` count.

    Returns
    -------
    ndarray of shape (N,), intp
    """
    return NearestCentroid(centroids.astype(position.dtype, copy=False))(position)


class NearestCentroid:
    """The search for the nearest centroid, prepared for many blocks of rows.

    Distances are compared relative to the first centroid: what all of them share cancels before anything is squared.

    Parameters
    ----------
    centroids : ndarray of shape (K, d')
    """

    def __init__(self, centroids: FloatArray) -> None:
        self.width = centroids.shape[1]
        self.count = centroids.shape[0]
        self.origin = centroids[0]
        relative = centroids - self.origin
        self.directions = np.ascontiguousarray(-2.0 * relative.T)
        power = np.einsum("kd,kd->k", relative, relative)
        # Where the centroids lie about zero the rows need not be moved; far from it, they must, or lose digits.
        self.moved = float(np.abs(self.origin).max(initial=0.0)) > 8.0 * float(
            np.abs(relative).max(initial=0.0)
        )
        self.bias = power if self.moved else power - self.origin @ self.directions

    def __call__(self, position: FloatArray) -> NDArray[np.intp]:
        """Return the nearest centroid of each row, the lowest index where several are equally near."""
        if self.count == 1:
            return np.zeros(position.shape[0], dtype=np.intp)
        position = position[:, : self.width]
        scores = (position - self.origin if self.moved else position) @ self.directions
        scores += self.bias
        label: NDArray[np.intp] = np.argmin(scores, axis=1)
        return label


def principal_axes(centred: FloatArray, count: int) -> FloatArray:
    """Return the leading principal axes of centred rows, as rows, with a fixed sign.

    Parameters
    ----------
    centred : ndarray of shape (N, P)
    count : int
        Number of axes wanted; fewer are returned when the rank is smaller.

    Returns
    -------
    ndarray of shape (d, P), orthonormal rows
    """
    rows, width = centred.shape
    tall = rows >= width
    gram = centred.T @ centred if tall else centred @ centred.T
    values, vectors = np.linalg.eigh(gram)
    # The Gram matrix halves the digits: directions below this are rounding.
    kept = np.argsort(values)[::-1][: min(count, width, rows)]
    kept = kept[values[kept] > max(float(values[-1]), 0.0) * max(rows, width) * np.finfo(np.float64).eps]
    axes = vectors[:, kept].T if tall else (vectors[:, kept].T @ centred) / np.sqrt(values[kept])[:, None]
    largest = np.argmax(np.abs(axes), axis=1)
    signs = np.where(axes[np.arange(axes.shape[0]), largest] < 0, -1.0, 1.0)
    fixed: FloatArray = axes * signs[:, None]
    return fixed


def seek_centroids(position: FloatArray, n_clusters: int, seed: int, n_init: int = 1) -> FloatArray:
    """Cluster rows with k-means and return the centroids that have members.

    Parameters
    ----------
    position : ndarray of shape (N, d)
        Rows to cluster.
    n_clusters : int
        Number of clusters wanted; distinct rows are an upper bound, without a warning.
    seed : int
        Seed of the k-means++ initialisation.
    n_init : int, default=1
        Number of initialisations, the best of which is kept.

    Returns
    -------
    ndarray of shape (K, d), float64
    """
    position = np.ascontiguousarray(position, dtype=np.float64)
    if n_clusters <= 1 or position.shape[0] <= 1:
        single: FloatArray = position.mean(axis=0, keepdims=True)
        return single
    # k-means is run on centred data: scikit-learn's distances lose digits on a common offset.
    centre = position.mean(axis=0)
    kmeans = KMeans(n_clusters=min(n_clusters, position.shape[0]), n_init=n_init, random_state=seed)
    with warnings.catch_warnings():
        # Fewer distinct rows than clusters is dealt with below.
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels = kmeans.fit(position - centre).labels_
    used = np.unique(labels)
    centroids: FloatArray = kmeans.cluster_centers_[used].astype(np.float64) + centre
    return centroids
