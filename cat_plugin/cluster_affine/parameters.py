"""What a fitted correction is: a handful of arrays, named as the arguments of the op that applies them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cat_plugin.cluster_affine._typing import FloatArray
from cat_plugin.cluster_affine.families import MAPS, AffineMap, Terms
from cat_plugin.cluster_affine.geometry import Geometry, NearestCentroid, blocks, project
from cat_plugin.errors import CATValueError

__all__ = ["AffineParameters", "FloatArray"]


@dataclass(frozen=True, eq=False, init=False)
class AffineParameters:
    """Arrays of a fitted cluster-affine correction, float64, named as the arguments of its op.

    With ``p`` the projection of a row and ``k`` its nearest centroid, the modes are

    - ``diagonal``: ``z + alpha * (gamma_k * z + beta_k - z)``;
    - ``lowrank``: ``z + alpha * (gamma_k * z + beta_k - z + (p @ core_k) @ right)``;
    - ``full``: ``z + alpha * (weight_k @ x + beta_k - z)`` with ``x`` the logits followed by the features.

    Each array is an attribute; a mode has no others than its own.

    Parameters
    ----------
    mode : {"diagonal", "lowrank", "full"}
        Which map the arrays describe.
    alpha : float
        Blending factor; 0 leaves the logits as they are, 1 applies the map in full.
    **arrays : ndarray
        By name:

        - ``mean``, shape (P,): subtracted before projecting; ``P`` is ``C`` plus the number of features.
        - ``components``, shape (d, P): principal axes; with ``d = 0`` there is no projection, ``p`` is the row itself.
        - ``centroids``, shape (K, d') with d' <= d, or (K, P) without projection: cluster centres in the space of
          (the first ``d'`` coordinates of) ``p``.
        - ``beta``, shape (K, C): offsets.
        - ``gamma``, shape (K, C): slopes of each class (``diagonal`` and ``lowrank``).
        - ``core``, shape (K, d, r): a cluster's part of the low-rank map (``lowrank``).
        - ``right``, shape (r, C): the part of it that all clusters share (``lowrank``).
        - ``weight``, shape (K, C, P): matrices (``full``).

    Raises
    ------
    CATValueError
        If the mode is unknown, an array is missing or not of that mode, or the shapes do not fit each other.

    References
    ----------
    "CAT: Post-Training Quantization Error Reduction via Cluster-based Affine Transformation",
    arXiv:2509.26277 (the ``diagonal`` mode).
    """

    mode: str
    alpha: float

    def __init__(self, mode: str, alpha: float, **arrays: FloatArray | None) -> None:
        names = _map_of(mode).arrays
        for name in names:
            if arrays.get(name) is None:
                raise CATValueError(
                    f"the {mode!r} mode needs the array {name!r}, which is missing; give {', '.join(names)}."
                )
        for name, value in arrays.items():
            if name not in names and value is not None:
                raise CATValueError(f"the {mode!r} mode has no array {name!r}; leave it out.")
        own: dict[str, Any] = {name: np.ascontiguousarray(arrays[name], dtype=np.float64) for name in names}
        given = {name: array.shape for name, array in own.items()}
        for name, expected in _map_of(mode).expected_shapes(given).items():
            if given[name] != expected:
                raise CATValueError(
                    f"the array {name!r} has shape {given[name]}; beside the others it must have {expected}."
                )
        for name, attribute in {"mode": mode, "alpha": float(alpha), **own}.items():
            object.__setattr__(self, name, attribute)

    def __getattr__(self, name: str) -> FloatArray:
        """Say which mode has no such array; those it has are attributes."""
        raise AttributeError(f"parameters of mode {self.__dict__.get('mode')!r} have no {name!r}")

    @property
    def map(self) -> AffineMap:
        """The map that the arrays are for."""
        return MAPS[self.mode]

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
        """Number of further regressors beside the logits, 0 for maps that take none."""
        return int(self.mean.shape[0]) - self.n_classes

    def terms(self) -> Terms:
        """Return what the map adds up to, before blending."""
        return self.map.terms(vars(self))

    def replace(self, **changes: Any) -> Self:
        """Return the same with another alpha or other arrays."""
        return type(self)(**{**vars(self), **changes})

    def to_arrays(self) -> dict[str, FloatArray]:
        """Return the arrays of this mode by name, ``alpha`` among them as a 0-d array."""
        arrays: dict[str, FloatArray] = {name: getattr(self, name) for name in self.map.arrays}
        arrays["alpha"] = np.asarray(self.alpha, dtype=np.float64)
        return arrays

    @classmethod
    def from_arrays(cls, mode: str, arrays: Mapping[str, FloatArray]) -> Self:
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
        names = (*_map_of(mode).arrays, "alpha")
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
        own = {name: array for name, array in arrays.items() if name != "alpha"}
        return cls(mode, float(alpha.reshape(())), **own)

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
        for rows in blocks(inputs):
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
        dtype, alpha, terms = inputs.dtype, self.alpha, self.terms()

        def cast(array: FloatArray | None) -> Any:
            return None if array is None else array.astype(dtype, copy=False)

        # Blending is folded into the map: one multiplication and one addition per logit are left.
        slope = None if terms.slope is None else cast(1.0 + alpha * (terms.slope - 1.0))
        shift = cast(alpha * terms.offset)
        matrix = None if terms.matrix is None else cast(alpha * terms.matrix)
        mean, components, right = cast(self.mean), cast(self.components), cast(terms.right)
        seek = NearestCentroid(cast(self.centroids))
        output = np.empty((inputs.shape[0], self.n_classes), dtype=dtype)
        for rows in blocks(inputs):
            block, result = inputs[rows], output[rows]
            position = project(block, mean, components)
            label = seek(position)
            if slope is None:
                np.multiply(block[:, : self.n_classes], 1.0 - alpha, out=result)
            else:
                # "clip" lets take write straight into the result; no label is out of range.
                np.take(slope, label, axis=0, out=result, mode="clip")
                result *= block[:, : self.n_classes]
            result += np.take(shift, label, axis=0)
            if matrix is not None:
                moved = _grouped_matmul(position if terms.projected else block, label, matrix)
                result += moved if right is None else moved @ right
        return output

    def widened(self, n_features: int) -> AffineParameters:
        """Write the correction as a full one that also takes features, without changing what it does.

        Parameters
        ----------
        n_features : int
            Number of feature columns that follow the logits.

        Returns
        -------
        AffineParameters
            Of mode ``full``.
        """
        missing = n_features - self.n_features
        if self.mode == "full" and missing == 0:
            return self
        terms = self.terms()
        geometry = Geometry(self.mean, self.components, self.centroids).widened(0)
        beta = terms.offset
        parts: list[FloatArray] = []
        if terms.slope is not None:
            parts.append(terms.slope[:, :, None] * np.eye(self.n_classes, self.mean.shape[0]))
        if terms.matrix is not None:
            change = geometry.components.T @ terms.matrix if terms.projected else terms.matrix
            if terms.right is not None:
                change = change @ terms.right
            if terms.projected:
                beta = beta - geometry.mean @ change
            parts.append(np.swapaxes(change, 1, 2))
        weight = sum(parts[1:], parts[0])
        wide = geometry.widened(missing)
        weight = np.pad(weight, ((0, 0), (0, 0), (0, missing)))
        return AffineParameters("full", self.alpha, **vars(wide), beta=beta, weight=weight)


def _map_of(mode: str) -> AffineMap:
    if mode not in MAPS:
        raise CATValueError(f"mode is {mode!r}; it must be one of {', '.join(sorted(MAPS))}.")
    return MAPS[mode]


def _grouped_matmul(rows: FloatArray, label: NDArray[np.intp], matrices: FloatArray) -> FloatArray:
    """Multiply each row by the matrix of its cluster: one product per cluster that occurs."""
    order = np.argsort(label, kind="stable")
    bounds = np.searchsorted(label[order], np.arange(matrices.shape[0] + 1))
    result = np.empty((rows.shape[0], matrices.shape[2]), dtype=rows.dtype)
    for cluster in np.flatnonzero(np.diff(bounds)):
        members = order[bounds[cluster] : bounds[cluster + 1]]
        result[members] = rows[members] @ matrices[cluster]
    return result
