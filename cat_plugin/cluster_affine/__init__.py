"""The mathematics of the correction: a scikit-learn estimator on numpy arrays of logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cat_plugin._lazy import attach

if TYPE_CHECKING:
    from cat_plugin.cluster_affine.estimator import ClusterAffine
    from cat_plugin.cluster_affine.parameters import AffineParameters

__all__ = ["AffineParameters", "ClusterAffine"]

_LAZY = {
    "AffineParameters": "cat_plugin.cluster_affine.parameters",
    "ClusterAffine": "cat_plugin.cluster_affine.estimator",
}

__getattr__, __dir__ = attach(__name__, _LAZY)
