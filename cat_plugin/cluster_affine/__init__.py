"""The mathematics of the correction: a scikit-learn estimator on numpy arrays of logits."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cat_plugin.cluster_affine.estimator import ClusterAffine
    from cat_plugin.cluster_affine.parameters import AffineParameters

__all__ = ["AffineParameters", "ClusterAffine"]

_LAZY = {
    "AffineParameters": "cat_plugin.cluster_affine.parameters",
    "ClusterAffine": "cat_plugin.cluster_affine.estimator",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
