"""Where a row of logits belongs: the projection, the centroids and the nearest of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cat_plugin.cluster_affine._typing import FloatArray

__all__ = ["Geometry", "NearestCentroid", "blocks", "project"]

#: Elements handled at a time: what a block touches stays in the cache.
_BLOCK_ELEMENTS: Final = 1 << 18


def blocks(rows: FloatArray) -> list[slice]:
    """Return slices that cut rows into blocks that stay in the cache."""
    step = max(16, _BLOCK_ELEMENTS // max(1, rows.shape[1]))
    return [slice(start, start + step) for start in range(0, rows.shape[0], step)]


def project(rows: FloatArray, mean: FloatArray, components: FloatArray) -> FloatArray:
    """Project rows onto the principal axes; without axes the rows are returned as they are.

    Parameters
    ----------
    rows : ndarray of shape (N, P)
        Logits, followed by the features where there are any.
    mean : ndarray of shape (P,)
        Subtracted before projecting.
    components : ndarray of shape (d, P)
        Principal axes; ``d = 0`` stands for no projection.

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
    for block in blocks(rows):
        np.matmul(rows[block] - near, directions, out=projected[block])
    projected += lost.astype(dtype, copy=False)
    return projected


class NearestCentroid:
    """The search for the nearest centroid, prepared for many blocks of rows.

    Distances are compared relative to the first centroid: what all of them share cancels before anything is squared.

    Parameters
    ----------
    centroids : ndarray of shape (K, d')
        Only the first ``d'`` coordinates of a position count.
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


@dataclass(frozen=True, eq=False)
class Geometry:
    """Which cluster a row belongs to.

    Parameters
    ----------
    mean : ndarray of shape (P,)
        Subtracted before projecting.
    components : ndarray of shape (d, P)
        Principal axes; ``d = 0``: no projection.
    centroids : ndarray of shape (K, d), or (K, P) without projection
        Cluster centres in the space of the projection.
    """

    mean: FloatArray
    components: FloatArray
    centroids: FloatArray

    @property
    def n_clusters(self) -> int:
        """Number of clusters K."""
        return int(self.centroids.shape[0])

    def assign(self, rows: FloatArray) -> tuple[FloatArray, NDArray[np.intp]]:
        """Return the projection of each row and its nearest centroid, in the precision of the rows."""
        position = project(rows, self.mean, self.components)
        return position, NearestCentroid(self.centroids.astype(position.dtype, copy=False))(position)

    def widened(self, n_features: int) -> Geometry:
        """Return the same clusters of the logits for rows in which features follow the logits."""
        given = self.mean.shape[0]
        projected = bool(self.components.shape[0])
        mean, axes = (self.mean, self.components) if projected else (np.zeros(given), np.eye(given))
        padding = ((0, 0), (0, n_features))
        return Geometry(np.pad(mean, padding[1]), np.pad(axes, padding), self.centroids)
