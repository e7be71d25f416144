"""The logits in two dimensions: where each cluster lies, where the correction moves it, where it should be."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["cluster_summary"]

FloatArray = NDArray[np.floating[Any]]

#: Rows that are drawn one by one; the clusters' means are those of all rows.
_POINTS = 600


def _agreement(first: FloatArray, second: FloatArray) -> float:
    return float((first.argmax(1) == second.argmax(1)).mean())


def _rounded(values: FloatArray) -> list[Any]:
    rounded: list[Any] = np.round(values.astype(np.float64), 4).tolist()
    return rounded


def cluster_summary(
    quantized: FloatArray,
    corrected: FloatArray,
    labels: NDArray[np.integer[Any]],
    full: FloatArray | None = None,
) -> dict[str, Any]:
    """Project logits on the first two principal components of the quantized ones.

    Parameters
    ----------
    quantized, corrected : ndarray of shape (N, C)
        Logits before and after the cluster-affine step.
    labels : ndarray of shape (N,), int
        Cluster of each row.
    full : ndarray of shape (N, C), optional
        Logits of the full-precision model on the same rows.

    Returns
    -------
    dict
        JSON-able: ``explained`` (share of variance of both components), ``points`` (x, y of the quantized logits and
        the cluster, for some rows), ``means`` (for each cluster with rows its number, its rows and the mean of the
        quantized, corrected and full-precision logits), ``error`` (mean squared error to full precision, before and after)
        and ``agreement`` (share of rows given the full-precision model's class, before and after).
    """
    centre = quantized.mean(0)
    _, strengths, axes = np.linalg.svd((quantized - centre).astype(np.float64), full_matrices=False)
    axes = axes[:2]
    if len(axes) < 2:
        axes = np.concatenate([axes, np.zeros((2 - len(axes), quantized.shape[1]))])
    # The sign of a principal axis is arbitrary; this one is the same on every machine.
    axes = axes * np.where(axes[np.arange(2), np.abs(axes).argmax(1)] < 0, -1.0, 1.0)[:, None]
    total = float((strengths**2).sum())
    explained = (strengths[:2] ** 2 / total if total > 0 else np.zeros(2)).tolist()

    def place(rows: FloatArray) -> FloatArray:
        placed: FloatArray = (rows - centre) @ axes.T
        return placed

    shown = np.linspace(0, len(quantized) - 1, min(len(quantized), _POINTS)).astype(int)
    points = np.column_stack([place(quantized[shown]), labels[shown]])
    means = []
    for cluster in np.unique(labels):
        member = labels == cluster
        entry = {
            "cluster": int(cluster),
            "rows": int(member.sum()),
            "quantized": _rounded(place(quantized[member]).mean(0)),
            "corrected": _rounded(place(corrected[member]).mean(0)),
        }
        if full is not None:
            entry["full"] = _rounded(place(full[member]).mean(0))
        means.append(entry)
    summary: dict[str, Any] = {
        "rows": len(quantized),
        "explained": [*explained, 0.0][:2],
        "points": _rounded(points),
        "means": means,
    }
    if full is not None:
        summary["error"] = [float(((z - full) ** 2).mean()) for z in (quantized, corrected)]
        summary["agreement"] = [_agreement(quantized, full), _agreement(corrected, full)]
    return summary
