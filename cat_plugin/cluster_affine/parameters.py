"""What a fitted correction is: a handful of arrays, named as the arguments of the ops that apply it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cat_plugin.cluster_affine.clustering import NearestCentroid, project
from cat_plugin.errors import CATValueError

__all__ = ["MODES", "AffineParameters", "FloatArray"]

FloatArray = NDArray[np.floating[Any]]

#: The arrays of each mode, in the order in which its op takes them.
MODES: Final[dict[str, tuple[str, ...]]] = {
    "diagonal": ("mean", "components", "centroids", "gamma", "beta"),
    "lowrank": ("mean", "components", "centroids", "gamma", "beta", "core", "right"),
    "full": ("mean", "components", "centroids", "weight", "beta"),
}

#: Rows handled at a time: what a block touches stays in the cache.
_BLOCK_ELEMENTS: Final = 1 << 18


@dataclass(frozen=True, eq=False)
class AffineParameters:
    """Arrays of a fitted cluster-affine correction, float64, named as the arguments of its op.

    With ``p`` the projection of a row and ``k`` its nearest centroid, the modes are

    - ``diagonal``: ``z + alpha * (gamma_k * z + beta_k - z)``;
    - ``lowrank``: ``z + alpha * (gamma_k * z + beta_k - z + (p @ core_k) @ right)``;
    - ``full``: ``z + alpha * (weight_k @ x + beta_k - z)`` with ``x`` the logits followed by the features.

    Parameters
    ----------
    mode : {"diagonal", "lowrank", "full"}
        Which of the three maps the arrays describe.
    alpha : float
        Blending factor; 0 leaves the logits as they are, 1 applies the map in full.
    mean : ndarray of shape (P,)
        Subtracted before projecting; ``P`` is ``C`` plus the number of features.
    components : ndarray of shape (d, P)
        Principal axes; ``d = 0`` means that there is no projection and that ``p`` is the row itself.
    centroids : ndarray of shape (K, d') with d' <= d, or (K, P) without projection
        Cluster centres in the space of (the first ``d'`` coordinates of) ``p``.
    beta : ndarray of shape (K, C)
        Offsets.
    gamma : ndarray of shape (K, C), optional
        Per-class slopes (``diagonal`` and ``lowrank``).
    core : ndarray of shape (K, d, r), optional
        Cluster's part of the low-rank map (``lowrank``).
    right : ndarray of shape (r, C), optional
        Part of the low-rank map that all clusters share (``lowrank``).
    weight : ndarray of shape (K, C, P), optional
        Matrices of the ``full`` mode.

    References
    ----------
    "CAT: Post-Training Quantization Error Reduction via Cluster-based Affine Transformation",
    arXiv:2509.26277 (the ``diagonal`` mode).
    """

    mode: str
    alpha: float
    mean: FloatArray
    components: FloatArray
    centroids: FloatArray
    beta: FloatArray
    gamma: FloatArray | None = None
    core: FloatArray | None = None
    right: FloatArray | None = None
    weight: FloatArray | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise CATValueError(f"mode is {self.mode!r}; it must be one of {', '.join(sorted(MODES))}.")
        for field in fields(self):
            if field.name in ("mode", "alpha"):
                continue
            value = getattr(self, field.name)
            if field.name in MODES[self.mode]:
                if value is None:
                    raise CATValueError(
                        f"the {self.mode!r} mode needs the array {field.name!r}, which is missing; "
                        f"give {', '.join(MODES[self.mode])}."
                    )
                object.__setattr__(self, field.name, np.ascontiguousarray(value, dtype=np.float64))
            elif value is not None:
                raise CATValueError(f"the {self.mode!r} mode has no array {field.name!r}; leave it out.")
        object.__setattr__(self, "alpha", float(self.alpha))
        self._check_shapes()

    def _check_shapes(self) -> None:
        inputs, clusters = self.mean.shape[0], self.centroids.shape[0]
        axes, classes = self.components.shape[0], self.beta.shape[-1]
        width = self.centroids.shape[1]
        expected: dict[str, tuple[int, ...]] = {
            "mean": (inputs,),
            "components": (axes, inputs),
            "centroids": (clusters, min(width, axes) if axes else inputs),
            "gamma": (clusters, classes),
            "beta": (clusters, classes),
            "weight": (clusters, classes, inputs),
        }
        if self.core is not None and self.right is not None:
            rank = self.right.shape[0]
            expected["core"] = (clusters, axes or inputs, rank)
            expected["right"] = (rank, classes)
        for name in MODES[self.mode]:
            shape = getattr(self, name).shape
            if shape != expected[name]:
                raise CATValueError(
                    f"the array {name!r} has shape {shape}; beside the others it must have {expected[name]}."
                )

    @property
    def n_clusters(self) -> int:
        """Number of clusters K."""
        return int(self.centroids.shape[0])

    @property
    def n_classes(self) -> int:
        """Number of classes C."""
        return int(self.beta.shape[1])

    @property
    def n_features(self) -> int:
        """Number of further regressors beside the logits (``full`` mode only, else 0)."""
        return int(self.mean.shape[0]) - self.n_classes if self.mode == "full" else 0

    def to_arrays(self) -> dict[str, FloatArray]:
        """Return the arrays of this mode by name, ``alpha`` among them as a 0-d array."""
        arrays: dict[str, FloatArray] = {name: getattr(self, name) for name in MODES[self.mode]}
        arrays["alpha"] = np.asarray(self.alpha, dtype=np.float64)
        return arrays

    @classmethod
    def from_arrays(cls, mode: str, arrays: Mapping[str, FloatArray]) -> AffineParameters:
        """Rebuild the parameters from what :meth:`to_arrays` returned.

        Parameters
        ----------
        mode : {"diagonal", "lowrank", "full"}
            The mode they were of.
        arrays : mapping of str to ndarray
            The arrays by name.

        Returns
        -------
        AffineParameters

        Raises
        ------
        CATValueError
            If an array is missing or unknown, or the shapes do not fit each other.
        """
        if mode not in MODES:
            raise CATValueError(f"mode is {mode!r}; it must be one of {', '.join(sorted(MODES))}.")
        names = (*MODES[mode], "alpha")
        missing = [name for name in names if name not in arrays]
        unknown = sorted(set(arrays) - set(names))
        if missing or unknown:
            raise CATValueError(
                f"the {mode!r} mode has the arrays {', '.join(names)}; "
                f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}."
            )
        alpha = np.asarray(arrays["alpha"], dtype=np.float64)
        if alpha.size != 1:
            raise CATValueError(f"alpha has shape {alpha.shape}; it must be a single number.")
        return cls(mode=mode, alpha=float(alpha.reshape(())), **{n: arrays[n] for n in MODES[mode]})

    def assign(self, inputs: FloatArray) -> NDArray[np.intp]:
        """Return the index of the nearest centroid of each row, the lowest where several are nearest.

        Parameters
        ----------
        inputs : ndarray of shape (N, P)
            Logits, followed by the features where there are any.

        Returns
        -------
        ndarray of shape (N,), intp
        """
        labels = np.empty(inputs.shape[0], dtype=np.intp)
        seek = NearestCentroid(self.centroids)
        for rows in _blocks(inputs):
            labels[rows] = seek(project(inputs[rows], self.mean, self.components))
        return labels

    def apply(self, inputs: FloatArray) -> FloatArray:
        """Correct logits; the reference for every other implementation.

        Parameters
        ----------
        inputs : ndarray of shape (N, P), float32 or float64
            Logits, followed by the features where there are any.

        Returns
        -------
        ndarray of shape (N, C), of the dtype of `inputs`
        """
        dtype = inputs.dtype
        mean, components, centroids, shift = (
            a.astype(dtype, copy=False)
            for a in (self.mean, self.components, self.centroids, self.alpha * self.beta)
        )
        seek = NearestCentroid(centroids)
        # Blending is folded into the map: one multiplication and one addition per logit are left.
        scale = (
            None if self.gamma is None else (1.0 + self.alpha * (self.gamma - 1.0)).astype(dtype, copy=False)
        )
        maps = None
        if self.weight is not None:
            maps = (self.alpha * self.weight).astype(dtype, copy=False).transpose(0, 2, 1)
        elif self.core is not None and self.right is not None:
            core, right = (a.astype(dtype, copy=False) for a in (self.alpha * self.core, self.right))
        output = np.empty((inputs.shape[0], self.n_classes), dtype=dtype)
        for rows in _blocks(inputs):
            block, result = inputs[rows], output[rows]
            position = project(block, mean, components)
            label = seek(position)
            if scale is None:
                np.multiply(block[:, : self.n_classes], 1.0 - self.alpha, out=result)
            else:
                # "clip" lets take write straight into the result; no label is out of range.
                np.take(scale, label, axis=0, out=result, mode="clip")
                result *= block
            result += np.take(shift, label, axis=0)
            if maps is not None:
                result += _grouped_matmul(block, label, maps)
            elif self.core is not None:
                result += _grouped_matmul(position, label, core) @ right
        return output


def _blocks(inputs: FloatArray) -> list[slice]:
    step = max(16, _BLOCK_ELEMENTS // max(1, inputs.shape[1]))
    return [slice(start, start + step) for start in range(0, inputs.shape[0], step)]


def _grouped_matmul(rows: FloatArray, label: NDArray[np.intp], matrices: FloatArray) -> FloatArray:
    """Multiply each row by the matrix of its cluster: one product per cluster that occurs."""
    order = np.argsort(label, kind="stable")
    bounds = np.searchsorted(label[order], np.arange(matrices.shape[0] + 1))
    result = np.empty((rows.shape[0], matrices.shape[2]), dtype=rows.dtype)
    for cluster in np.flatnonzero(np.diff(bounds)):
        members = order[bounds[cluster] : bounds[cluster + 1]]
        result[members] = rows[members] @ matrices[cluster]
    return result
