"""How clusters are found: principal axes and k-means."""

from __future__ import annotations

import warnings

import numpy as np
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from cat_plugin.cluster_affine._typing import FloatArray

__all__ = ["principal_axes", "seek_centroids"]


def principal_axes(centred: FloatArray, count: int) -> FloatArray:
    """Return the leading principal axes of centred rows, as rows, with a fixed sign.

    Parameters
    ----------
    centred : ndarray of shape (N, P)
        Rows from which their mean has been subtracted.
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
