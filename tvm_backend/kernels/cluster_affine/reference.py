"""The cluster-affine step in float64 numpy, written for reading, against which the kernels are tested."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tvm_backend.kernels.cluster_affine.spec import ClusterAffineSpec

__all__ = ["nearest", "reference"]

_Float = NDArray[np.float64]


def nearest(points: _Float, centroids: _Float) -> NDArray[np.int64]:
    """Index of the nearest centroid of each point, the lowest one among equals.

    Parameters
    ----------
    points : ndarray of shape (N, d)
        What is compared.
    centroids : ndarray of shape (K, d)
        What it is compared with.

    Returns
    -------
    ndarray of int64, shape (N,)
        For each point the index of its centroid.
    """
    result = np.empty(len(points), np.int64)
    for row, point in enumerate(points):
        result[row] = np.argmin(((point - centroids) ** 2).sum(axis=1))
    return result


def reference(spec: ClusterAffineSpec, *arrays: NDArray[np.generic]) -> tuple[NDArray[np.generic], ...]:
    """Compute the step in float64.

    Parameters
    ----------
    spec : ClusterAffineSpec
        What to compute; its batch is ignored.
    *arrays : ndarray
        The kernel's inputs in order, of any floating type.

    Returns
    -------
    tuple of ndarray
        The kernel's results in float64 (and int64 for classes).

    References
    ----------
    CAT, arXiv 2509.26277, section 3: the step after the quantized model.
    """
    names = [name for name, _, _ in spec.arguments()]
    given = {name: np.asarray(array, np.float64) for name, array in zip(names, arrays, strict=False)}
    logits = given["logits"]
    inputs = np.concatenate([logits, given["features"]], axis=1) if spec.n_features else logits
    points = (inputs - given["mean"]) @ given["components"].T if spec.n_components else inputs
    cluster = nearest(points[:, : spec.distance_width], given["centroids"])
    if spec.has("weight"):
        mapped = np.stack([given["weight"][k] @ x for k, x in zip(cluster, inputs, strict=True)])
    else:
        mapped = given["gamma"][cluster] * logits
    mapped = mapped + given["beta"][cluster]
    if spec.has("core"):
        mapped += np.stack(
            [(p @ given["core"][k]) @ given["right"] for k, p in zip(cluster, points, strict=True)]
        )
    result = logits + spec.alpha * (mapped - logits)
    if spec.finish == "softmax":
        shifted = np.exp(result - result.max(axis=1, keepdims=True))
        return (shifted / shifted.sum(axis=1, keepdims=True),)
    if spec.finish == "topk":
        order = np.argsort(-result, axis=1, kind="stable")[:, : spec.top_k]
        return np.take_along_axis(result, order, axis=1), order
    return (result,)
