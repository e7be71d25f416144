"""Both models' logits of the same inputs, side by side as rows to fit to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cat_plugin.cluster_affine import validation
from cat_plugin.cluster_affine._typing import FloatArray
from cat_plugin.cluster_affine.rows import Rows
from cat_plugin.errors import CATValueError

__all__ = ["Columns", "pair", "pair_sound", "unpacked"]


@dataclass(frozen=True)
class Columns:
    """What the columns of a fit's arrays are.

    Attributes
    ----------
    flat : bool
        Whether the targets were given as a vector (N,); a prediction is one then, too.
    targets : int
        Columns of the targets.
    extra : int
        Columns of the features that were given beside the logits.
    """

    flat: bool
    targets: int
    extra: int

    @classmethod
    def of(cls, rows: Rows) -> Columns:
        """Return the columns of rows that are paired already."""
        return cls(False, rows.z_fp.shape[1], rows.n_features)


def unpacked(batch: Any) -> tuple[Any, Any, Any]:
    """Return z_q, z_fp and features (or None) of a batch."""
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        raise CATValueError(
            f"a batch is {type(batch).__name__}; expected (z_q, z_fp) or (z_q, z_fp, features)."
        )
    return batch[0], batch[1], batch[2] if len(batch) == 3 else None


def pair(
    estimator: Any, z_q: Any, z_fp: Any, features: Any, *, known: Columns | None = None, first_row: int = 0
) -> tuple[Rows, Columns]:
    """Check a batch and pair it.

    Parameters
    ----------
    estimator : BaseEstimator
        Remembers the number of columns, in the manner of scikit-learn.
    z_q, z_fp : array-like of shape (N, C)
        Logits of the quantized and of the full-precision model.
    features : array-like of shape (N, F) or None
        Further regressors.
    known : Columns, optional
        What earlier batches had, which this one has to have as well.
    first_row : int, default=0
        Index of the batch's first row in the stream, for messages.

    Raises
    ------
    CATValueError
        If the arrays do not fit each other or the batches before, or hold a NaN or an infinity.
    """
    inputs, targets, flat = validation.check_pair(
        estimator, z_q, z_fp, reset=known is None, first_row=first_row
    )
    further = validation.check_features(features, inputs.shape[0], None if known is None else known.extra)
    if known is None:
        known = Columns(flat, targets.shape[1], 0 if further is None else int(further.shape[1]))
    elif targets.shape[1] != known.targets:
        raise CATValueError(
            f"z_fp has {targets.shape[1]} columns and had {known.targets} in the batches before."
        )
    return _split(inputs, targets, further), known


def pair_sound(z_q: Any, z_fp: Any, features: Any) -> Rows:
    """Pair arrays that :func:`pair` has let through before, without looking at them again."""
    arrays = [None if a is None else np.asarray(validation.as_array(a)) for a in (z_q, z_fp, features)]
    if any(a is not None and a.dtype not in (np.float32, np.float64) for a in arrays):
        arrays = [None if a is None else a.astype(np.float64) for a in arrays]
    assert arrays[0] is not None
    assert arrays[1] is not None
    return _split(arrays[0], arrays[1].reshape(len(arrays[1]), -1), arrays[2])


def _split(inputs: FloatArray, targets: FloatArray, further: FloatArray | None) -> Rows:
    """Move columns of `inputs` beyond the target's to the features."""
    classes = targets.shape[1]
    if classes < inputs.shape[1]:
        rest = inputs[:, classes:]
        further = rest if further is None else np.concatenate([rest, further], axis=1)
    return Rows(inputs[:, :classes], targets, further)
