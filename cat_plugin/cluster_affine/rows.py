"""Rows at hand, and what is measured on their columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cat_plugin.cluster_affine._typing import FloatArray

__all__ = ["Rows", "Scaling"]


@dataclass(frozen=True, eq=False)
class Rows:
    """Paired logits, features and what is known about each row.

    Parameters
    ----------
    z_q : ndarray of shape (N, C)
        Logits of the quantized model.
    z_fp : ndarray of shape (N, C)
        Logits of the full-precision model.
    features : ndarray of shape (N, F), optional
        Further regressors.
    tuned : ndarray of shape (N,), bool, optional
        Whether the quantizer was tuned on the row.
    groups : ndarray of shape (N,), optional
        Rows of one group are never on both sides of a fold.
    """

    z_q: FloatArray
    z_fp: FloatArray
    features: FloatArray | None = None
    tuned: NDArray[np.bool_] | None = None
    groups: NDArray[Any] | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self.z_q.shape[0])

    @property
    def n_features(self) -> int:
        """Number of feature columns."""
        return 0 if self.features is None else int(self.features.shape[1])

    @property
    def width(self) -> int:
        """Number of columns of all arrays together."""
        return int(self.z_q.shape[1] + self.z_fp.shape[1]) + self.n_features

    def slices(self, count: int) -> Iterator[Rows]:
        """Return the rows in pieces of `count`, the last one of what is left."""
        for start in range(0, len(self), count):
            yield self.take(np.arange(start, min(start + count, len(self))))

    def take(self, index: NDArray[Any]) -> Rows:
        """Return some of the rows, by index or mask."""
        picked = [None if a is None else a[index] for a in (self.features, self.tuned, self.groups)]
        return Rows(self.z_q[index], self.z_fp[index], *picked)

    def widened(self) -> Rows:
        """Return the rows in float64."""
        wide = [
            None if a is None else a.astype(np.float64, copy=False)
            for a in (self.z_q, self.z_fp, self.features)
        ]
        assert wide[0] is not None
        assert wide[1] is not None
        return Rows(wide[0], wide[1], wide[2], self.tuned, self.groups)

    @classmethod
    def concatenated(cls, parts: list[Rows]) -> Rows:
        """Join parts, none of which or all of which have features, masks and groups."""
        if len(parts) == 1:
            return parts[0]

        def joined(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            return None if values[0] is None else np.concatenate(values)

        return cls(joined("z_q"), joined("z_fp"), joined("features"), joined("tuned"), joined("groups"))

    def inputs(self, use_features: bool = True) -> FloatArray:
        """Return the logits followed by the features."""
        if self.features is None or not use_features:
            return self.z_q
        return np.concatenate([self.z_q, self.features], axis=1)


@dataclass(frozen=True, eq=False)
class Scaling:
    """Centre and size of the columns: features count in the units of the logits."""

    mean: FloatArray
    scale: FloatArray

    @classmethod
    def of(cls, rows: Rows) -> Scaling:
        """Measure them on rows."""
        inputs = rows.inputs()
        mean = inputs[0] + (inputs - inputs[0]).mean(axis=0)
        scale = np.ones(inputs.shape[1])
        if rows.n_features:
            classes = rows.z_q.shape[1]
            power = np.mean((inputs - mean) ** 2, axis=0)
            logits, features = power[:classes].mean(), power[classes:].mean()
            if logits > 0 and features > 0:
                scale[classes:] = np.sqrt(features / logits)
        return cls(mean, scale)
