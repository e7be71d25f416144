"""Sufficient statistics of every closed-form map: small, collected batch by batch without losing digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cat_plugin.cluster_affine._typing import FloatArray

__all__ = ["ClusterStatistics", "StatisticsAccumulator"]


@dataclass(frozen=True, eq=False)
class ClusterStatistics:
    """Counts, means and centred second moments per cluster.

    All moments are taken about the cluster's own mean, in float64, and processes merge theirs by the update of
    Chan, Golub and LeVeque: an offset common to all logits costs no digits, however large it is beside their spread.

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

    @property
    def n_clusters(self) -> int:
        """Number of clusters."""
        return int(self.count.shape[0])

    @property
    def n_rows(self) -> float:
        """Number of rows over all clusters."""
        return float(self.count.sum())

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


class StatisticsAccumulator:
    """Sums about an anchor per cluster: the mean of the first rows that fell into it.

    The anchor is as close to the final mean as those rows are, so that subtracting it first keeps the digits that
    :class:`ClusterStatistics` promises, and a batch costs no copy of the statistics.

    Parameters
    ----------
    n_clusters : int
        K.
    n_classes : int
        C.
    n_regressors : int, default=0
        D, columns from which a full or low-rank map is to be fitted.
    """

    def __init__(self, n_clusters: int, n_classes: int, n_regressors: int = 0) -> None:
        self._raw = ClusterStatistics.zeros(n_clusters, n_classes, n_regressors)
        self._anchor_q, self._anchor_fp, self._anchor_x = (
            np.zeros_like(a) for a in (self._raw.mean_q, self._raw.mean_fp, self._raw.mean_x)
        )

    def add(
        self,
        z_q: FloatArray,
        z_fp: FloatArray,
        label: NDArray[np.intp],
        regressors: FloatArray | None = None,
    ) -> None:
        """Take in a batch.

        Parameters
        ----------
        z_q, z_fp : ndarray of shape (N, C)
            Logits of the two models.
        label : ndarray of shape (N,), intp
            Cluster of each row, below K.
        regressors : ndarray of shape (N, D), optional
            Columns from which a full or low-rank map is to be fitted.
        """
        raw = self._raw
        order = np.argsort(label, kind="stable")
        bounds = np.searchsorted(label[order], np.arange(raw.n_clusters + 1))
        for k in np.flatnonzero(np.diff(bounds)):
            rows = order[bounds[k] : bounds[k + 1]]
            q, f = z_q[rows], z_fp[rows]
            x = None if regressors is None else regressors[rows]
            if raw.count[k] == 0:
                self._anchor_q[k], self._anchor_fp[k] = _mean(q), _mean(f)
                if x is not None:
                    self._anchor_x[k] = _mean(x)
            raw.count[k] += rows.size
            # One cluster's share of a batch stays in the cache for all of these.
            q, f = q - self._anchor_q[k], f - self._anchor_fp[k]
            raw.mean_q[k] += q.sum(axis=0)
            raw.mean_fp[k] += f.sum(axis=0)
            if x is not None:
                x = x - self._anchor_x[k]
                raw.mean_x[k] += x.sum(axis=0)
                raw.xx[k] += x.T @ x
                raw.xq[k] += x.T @ q
                raw.xf[k] += x.T @ f
            raw.qf[k] += np.einsum("nc,nc->c", q, f)
            raw.qq[k] += np.einsum("nc,nc->c", q, q)
            raw.ff[k] += np.einsum("nc,nc->c", f, f)

    def result(self) -> ClusterStatistics:
        """Return the statistics of all rows taken in; the accumulator is spent."""
        raw = self._raw
        share = np.maximum(raw.count, 1.0)[:, None]
        q, f, x = (drift / share for drift in (raw.mean_q, raw.mean_fp, raw.mean_x))
        n = raw.count[:, None]
        np.maximum(raw.qq - n * q * q, 0.0, out=raw.qq)
        np.maximum(raw.ff - n * f * f, 0.0, out=raw.ff)
        raw.qf[...] -= n * q * f
        for k, count in enumerate(raw.count):
            raw.xx[k] -= count * np.outer(x[k], x[k])
            raw.xq[k] -= count * np.outer(x[k], q[k])
            raw.xf[k] -= count * np.outer(x[k], f[k])
        raw.mean_q[...] = self._anchor_q + q
        raw.mean_fp[...] = self._anchor_fp + f
        raw.mean_x[...] = self._anchor_x + x
        return raw


def _mean(rows: FloatArray) -> FloatArray:
    # Relative to the first row, so that a common offset is not summed.
    first = rows[0].astype(np.float64)
    mean: FloatArray = first + (rows - first).mean(axis=0)
    return mean
