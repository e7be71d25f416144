"""Collect statistics batch after batch, in place."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cat_plugin.cluster_affine.statistics import ClusterStatistics

__all__ = ["StatisticsAccumulator"]

FloatArray = NDArray[np.floating[Any]]


class StatisticsAccumulator:
    """Sums about an anchor per cluster: the mean of the first rows that fell into it.

    The anchor is as close to the final mean as those rows are, so that subtracting it first keeps the digits that
    :class:`ClusterStatistics` promises, and a batch costs no copy of the statistics.

    Parameters
    ----------
    n_clusters, n_classes : int
    n_regressors : int, default=0
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
        """Take in a batch; shapes as in :meth:`ClusterStatistics.from_rows`."""
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
