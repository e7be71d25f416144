"""Batches of logits: those that can be read several times, checked on the first pass, and those that cannot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from cat_plugin.cluster_affine.pairing import Columns, pair, pair_sound, unpacked
from cat_plugin.cluster_affine.rows import Rows
from cat_plugin.errors import CATValueError

__all__ = ["CheckedBatches", "feed"]


class CheckedBatches:
    """Rows of batches; calling it makes a pass over them, and only the first complete pass checks what they hold.

    Parameters
    ----------
    estimator : BaseEstimator
        Remembers the number of columns, in the manner of scikit-learn.
    batches : iterable of (z_q, z_fp) or (z_q, z_fp, features)
        A list or a data loader: something that can be read again.

    Attributes
    ----------
    columns : Columns or None
        What the columns are; None until a batch with rows has been read.
    """

    def __init__(self, estimator: Any, batches: Iterable[Any]) -> None:
        self.columns: Columns | None = None
        self._estimator = estimator
        self._batches = batches
        self._passed = False

    def __call__(self) -> Iterator[Rows]:
        """Read the batches from the start, without those that hold no rows.

        Yields
        ------
        Rows
            Of one batch.

        Raises
        ------
        CATValueError
            If a batch cannot be used; the message says which row of the stream.
        """
        seen = 0
        for batch in self._batches:
            z_q, z_fp, features = unpacked(batch)
            if not len(z_q):
                continue
            if self._passed:
                rows = pair_sound(z_q, z_fp, features)
            else:
                rows, self.columns = pair(
                    self._estimator, z_q, z_fp, features, known=self.columns, first_row=seen
                )
            seen += len(rows)
            yield rows
        self._passed = True

    def width(self) -> int:
        """Numbers in a row of the first batch; 0 where no batch has rows."""
        first = next(self(), None)
        return 0 if first is None else first.width


def feed(estimator: Any, batches: Iterable[Any], sketch_rows: int | None) -> None:
    """Feed batches that can be read only once to an estimator's ``partial_fit``.

    Parameters
    ----------
    estimator : ClusterAffine
        Not fitted yet.
    batches : iterable of (z_q, z_fp) or (z_q, z_fp, features)
        Those without rows are left out.
    sketch_rows : int or None
        Rows kept for clustering and for choosing between candidates.

    Raises
    ------
    CATValueError
        If there are no rows, or a batch cannot be used.
    """
    fed = False
    for batch in batches:
        z_q, z_fp, features = unpacked(batch)
        if len(z_q):
            estimator.partial_fit(z_q, z_fp, features=features, sketch_rows=sketch_rows)
            fed = True
    if not fed:
        raise CATValueError("the batches held no rows; give at least one batch of logits.")
