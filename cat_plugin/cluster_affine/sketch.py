"""A bounded, order-independent sample of a stream of rows."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from cat_plugin.cluster_affine.rows import Rows

__all__ = ["RowSketch", "row_limit"]

_BUDGET_BYTES: Final = 48 << 20
_HASHED_COLUMNS: Final = 16


def row_limit(width: int) -> int:
    """Return how many rows are kept for clustering and for choosing between candidates.

    Parameters
    ----------
    width : int
        Columns of both sets of logits and of the features together.
    """
    return int(np.clip(_BUDGET_BYTES // (8 * max(1, width)), 2048, 16384))


class RowSketch:
    """Keep at most so many rows of a stream: those with the smallest hash of their content.

    Which rows those are depends neither on the order in which they come nor on how they are dealt to batches or
    processes, so that a fit on a stream, on its parts in parallel, and on the whole in memory see the same sample.
    While everything fits, the rows stay in the order in which they came.

    Parameters
    ----------
    limit : int
        Most rows to keep.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.seen = 0
        self._parts: list[Rows] = []
        self._keys: list[NDArray[np.uint64]] = []
        self._held = 0
        self._ceiling = np.uint64(np.iinfo(np.uint64).max)

    def add(self, rows: Rows) -> None:
        """Take in a batch."""
        self.seen += len(rows)
        keys = _content_keys(rows)
        if self.seen > self.limit:
            chosen = np.flatnonzero(keys <= self._ceiling)
            rows, keys = rows.take(chosen), keys[chosen]
        if not len(rows):
            return
        self._parts.append(rows)
        self._keys.append(keys)
        self._held += len(rows)
        # Cut back now and then, not for every batch; at once when a batch brings the ceiling.
        if self._held > self.limit + self.limit // 2:
            self._cut()

    def merge(self, other: RowSketch) -> None:
        """Take in the sketch of other rows of the same stream."""
        self.seen += other.seen
        self._parts += other._parts
        self._keys += other._keys
        self._held += other._held
        if self.seen > self.limit:
            self._cut()

    def _cut(self) -> None:
        rows, keys = Rows.concatenated(self._parts), np.concatenate(self._keys)
        order = np.argsort(keys, kind="stable")[: self.limit]
        self._parts, self._keys = [rows.take(order)], [keys[order]]
        self._held = order.size
        if order.size == self.limit:
            self._ceiling = keys[order[-1]]

    @classmethod
    def of(cls, rows: Rows, limit: int, seen: int) -> RowSketch:
        """Rebuild a sketch from the rows that it kept and the number that it saw."""
        made = cls(limit)
        made.seen, made._held = seen, len(rows)
        made._parts, made._keys = [rows], [_content_keys(rows)]
        return made

    @property
    def empty(self) -> bool:
        """Whether there were no rows."""
        return self.seen == 0

    @property
    def complete(self) -> bool:
        """Whether no row was left out."""
        return self.seen <= self.limit

    def rows(self) -> Rows:
        """Return the rows kept."""
        if not self.complete:
            self._cut()
        return Rows.concatenated(self._parts)


def _content_keys(rows: Rows) -> NDArray[np.uint64]:
    """Hash a few columns of each row: equal rows have equal keys, whatever batch they are in."""
    total = np.zeros(len(rows), dtype=np.uint64)
    multiplier = np.uint64(0x9E3779B97F4A7C15)
    for values in (rows.z_q, rows.z_fp):
        picked = np.unique(np.linspace(0, values.shape[1] - 1, _HASHED_COLUMNS).astype(int))
        # Adding zero makes one zero of the two that floating point has.
        bits = (values[:, picked].astype(np.float64) + 0.0).view(np.uint64)
        for column in bits.T:
            total += column ^ (column >> np.uint64(31))
            total *= multiplier
            total ^= total >> np.uint64(29)
    return total
