"""Sufficient statistics of every closed-form map: small, and merged by addition without losing digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cat_plugin.errors import CATValueError

__all__ = ["ClusterStatistics", "merge", "merge_clusters"]

FloatArray = NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class ClusterStatistics:
    """Counts, means and centred second moments per cluster.

    All moments are taken about the cluster's own mean, in float64, and merged by the update of Chan, Golub and
    LeVeque: an offset common to all logits costs no digits, however large it is beside their spread.

    Parameters
    ----------
    count : ndarray of shape (K,)
        Rows in each cluster.
    mean_q, mean_fp : ndarray of shape (K, C)
        Means of the quantized and of the full-precision logits.
    qq, qf, ff : ndarray of shape (K, C)
        Centred sums of products, class by class.
    mean_x : ndarray of shape (K, D)
        Means of the regressors; ``D = 0`` where only the diagonal map is wanted.
    xx : ndarray of shape (K, D, D)
        Centred second moments of the regressors.
    xq, xf : ndarray of shape (K, D, C)
        Centred products of the regressors with either set of logits.

    References
    ----------
    T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", COMPSTAT 1982.
    """

    count: FloatArray
    mean_q: FloatArray
    mean_fp: FloatArray
    qq: FloatArray
    qf: FloatArray
    ff: FloatArray
    mean_x: FloatArray
    xx: FloatArray
    xq: FloatArray
    xf: FloatArray

    @classmethod
    def zeros(cls, n_clusters: int, n_classes: int, n_regressors: int = 0) -> ClusterStatistics:
        """Return the statistics of no rows, the neutral element of addition."""
        classes, columns = (n_clusters, n_classes), (n_clusters, n_regressors)
        return cls(
            count=np.zeros(n_clusters),
            mean_q=np.zeros(classes),
            mean_fp=np.zeros(classes),
            qq=np.zeros(classes),
            qf=np.zeros(classes),
            ff=np.zeros(classes),
            mean_x=np.zeros(columns),
            xx=np.zeros((*columns, n_regressors)),
            xq=np.zeros((*columns, n_classes)),
            xf=np.zeros((*columns, n_classes)),
        )

    @classmethod
    def from_rows(
        cls,
        z_q: FloatArray,
        z_fp: FloatArray,
        label: NDArray[np.intp],
        n_clusters: int,
        regressors: FloatArray | None = None,
    ) -> ClusterStatistics:
        """Collect the statistics of a batch.

        Parameters
        ----------
        z_q, z_fp : ndarray of shape (N, C)
            Logits of the two models.
        label : ndarray of shape (N,), intp
            Cluster of each row, below `n_clusters`.
        n_clusters : int
        regressors : ndarray of shape (N, D), optional
            Columns from which a full or low-rank map is to be fitted.

        Returns
        -------
        ClusterStatistics
        """
        # Here, because the accumulator is made of this class.
        from cat_plugin.cluster_affine.accumulate import StatisticsAccumulator

        width = 0 if regressors is None else regressors.shape[1]
        accumulator = StatisticsAccumulator(n_clusters, z_fp.shape[1], width)
        accumulator.add(z_q, z_fp, label, regressors)
        return accumulator.result()

    @property
    def n_clusters(self) -> int:
        """Number of clusters."""
        return int(self.count.shape[0])

    @property
    def n_rows(self) -> float:
        """Number of rows over all clusters."""
        return float(self.count.sum())

    def __add__(self, other: ClusterStatistics) -> ClusterStatistics:
        """Merge with the statistics of other rows that were assigned by the same centroids."""
        if not isinstance(other, ClusterStatistics):
            return NotImplemented
        if self.xf.shape != other.xf.shape or self.mean_q.shape != other.mean_q.shape:
            raise CATValueError(
                f"statistics of shapes {self.xf.shape} and {other.xf.shape} cannot be merged; "
                "collect both with the same clusters, classes and regressors."
            )
        return merge([self, other])

    def __radd__(self, other: object) -> ClusterStatistics:
        """Allow ``sum(list_of_statistics)``."""
        return self if other == 0 else NotImplemented

    def about(self, means: tuple[FloatArray, FloatArray, FloatArray]) -> tuple[FloatArray, ...]:
        """Return the second moments about other means: ``qq, qf, ff, xx, xq, xf``."""
        q, f, x = (
            own - new for own, new in zip((self.mean_q, self.mean_fp, self.mean_x), means, strict=True)
        )
        n = self.count[:, None]
        nx = (n * x)[:, :, None]
        return (
            self.qq + n * q * q,
            self.qf + n * q * f,
            self.ff + n * f * f,
            self.xx + nx * x[:, None, :],
            self.xq + nx * q[:, None, :],
            self.xf + nx * f[:, None, :],
        )

    def reduced(self, total: Callable[[FloatArray], FloatArray]) -> ClusterStatistics:
        """Merge with the statistics of others, given nothing but a sum over all of them.

        Parameters
        ----------
        total : callable
            Takes an array, returns its sum over all parties (an all-reduce).

        Returns
        -------
        ClusterStatistics
            The same on every party.
        """
        count = total(self.count)
        share = np.maximum(count, 1.0)[:, None]
        # Two rounds: a provisional mean from one reduction, then the remainder, so that a large common offset
        # is subtracted before it is summed.
        means = []
        for own in (self.mean_q, self.mean_fp, self.mean_x):
            n = self.count[:, None]
            rough = total(n * own) / share
            means.append(rough + total(n * (own - rough)) / share)
        moments = [total(moment) for moment in self.about((means[0], means[1], means[2]))]
        qq, qf, ff, xx, xq, xf = moments
        return ClusterStatistics(count, means[0], means[1], qq, qf, ff, means[2], xx, xq, xf)

    def pooled(self) -> ClusterStatistics:
        """Return the statistics of all rows as one cluster."""
        return merge_clusters(self)


def merge(parts: list[ClusterStatistics]) -> ClusterStatistics:
    """Merge statistics over disjoint rows, cluster by cluster."""
    counts = np.stack([part.count for part in parts])
    count = counts.sum(axis=0)
    share = np.maximum(count, 1.0)[:, None]
    largest = (np.argmax(counts, axis=0), np.arange(count.shape[0]))
    means = []
    for name in ("mean_q", "mean_fp", "mean_x"):
        own = np.stack([getattr(part, name) for part in parts])
        # Relative to one of the means, so that a common offset cancels before it is weighted.
        anchor = own[largest]
        drift = (counts[:, :, None] * (own - anchor)).sum(axis=0)
        means.append(anchor + drift / share)
    moments = [part.about((means[0], means[1], means[2])) for part in parts]
    qq, qf, ff, xx, xq, xf = (sum(moment[i] for moment in moments[1:]) + moments[0][i] for i in range(6))
    return ClusterStatistics(count, means[0], means[1], qq, qf, ff, means[2], xx, xq, xf)


def merge_clusters(parts: ClusterStatistics) -> ClusterStatistics:
    """Merge the clusters of one set of statistics into a single one."""
    share = max(float(parts.count.sum()), 1.0)
    anchor = int(np.argmax(parts.count))
    means = []
    for own in (parts.mean_q, parts.mean_fp, parts.mean_x):
        means.append(own[anchor] + (parts.count @ (own - own[anchor])) / share)
    wide = tuple(
        np.broadcast_to(m, own.shape)
        for m, own in zip(means, (parts.mean_q, parts.mean_fp, parts.mean_x), strict=True)
    )
    qq, qf, ff, xx, xq, xf = (m.sum(axis=0, keepdims=True) for m in parts.about((wide[0], wide[1], wide[2])))
    return ClusterStatistics(
        parts.count.sum(keepdims=True), means[0][None], means[1][None], qq, qf, ff, means[2][None], xx, xq, xf
    )
