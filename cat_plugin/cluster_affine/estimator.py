"""The estimator: fit on two sets of logits, correct a third."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from cat_plugin.cluster_affine.clustering import nearest, principal_axes, project, seek_centroids
from cat_plugin.cluster_affine.maps import closed_form_diagonal
from cat_plugin.cluster_affine.parameters import AffineParameters

__all__ = ["ClusterAffine"]

FloatArray = NDArray[np.floating[Any]]


class ClusterAffine(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Map logits of a quantized model to those of its full-precision original, cluster by cluster.

    Parameters
    ----------
    mode : str, default="auto"
    n_clusters : int, default=64
    alpha : float, default=0.4
    n_components : int, optional
    random_state : int, RandomState instance or None, default=None

    References
    ----------
    arXiv:2509.26277.
    """

    def __init__(
        self,
        mode: str = "auto",
        n_clusters: int = 64,
        alpha: float = 0.4,
        n_components: int | None = None,
        random_state: Any = None,
    ) -> None:
        self.mode = mode
        self.n_clusters = n_clusters
        self.alpha = alpha
        self.n_components = n_components
        self.random_state = random_state

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Return the method with the constants of the paper."""
        settings: dict[str, Any] = {"mode": "diagonal", "n_clusters": 64, "alpha": 0.4, "n_components": None}
        return cls(**(settings | overrides))

    def fit(self, z_q: ArrayLike, z_fp: ArrayLike) -> Self:
        """Fit on the logits of both models over the same rows."""
        inputs, targets = validate_data(self, z_q, z_fp, multi_output=True, y_numeric=True, dtype=np.float64)
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        mean = inputs.mean(axis=0)
        components = np.zeros((0, inputs.shape[1]))
        if self.n_components is not None:
            centred = inputs - mean
            components = principal_axes(mean, centred.T @ centred, self.n_components)
        position = project(inputs, mean, components)
        centroids = seek_centroids(position, self.n_clusters, seed)
        label = nearest(position, centroids)
        clusters = centroids.shape[0]
        member = np.zeros((clusters, inputs.shape[0]))
        member[label, np.arange(inputs.shape[0])] = 1.0
        count = member.sum(axis=1)
        share = np.maximum(count, 1.0)[:, None]
        mean_q, mean_fp = member @ inputs / share, member @ targets / share
        deviation = inputs - mean_q[label]
        gamma, beta = closed_form_diagonal(
            count,
            mean_q,
            mean_fp,
            member @ deviation**2,
            member @ (deviation * (targets - mean_fp[label])),
        )
        self.parameters_ = AffineParameters(
            mode="diagonal",
            alpha=float(self.alpha),
            mean=mean,
            components=components,
            centroids=centroids,
            gamma=gamma,
            beta=beta,
        )
        return self

    def predict(self, z_q: ArrayLike) -> FloatArray:
        """Return the corrected logits."""
        check_is_fitted(self)
        inputs = validate_data(self, z_q, reset=False, dtype=[np.float64, np.float32])
        return self.parameters_.apply(inputs)

    transform = predict
