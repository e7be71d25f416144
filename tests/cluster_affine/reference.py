"""The method row by row in float64, written from the paper's formulas: slow, and hard to get wrong."""

from __future__ import annotations

import numpy as np


def nearest_row(row, mean, components, centroids):
    """Index of the nearest centroid of one row, by the definition of the distance."""
    position = row if components.shape[0] == 0 else components @ (row - mean)
    distances = [float(((position[: c.size] - c) ** 2).sum()) for c in centroids]
    return int(np.argmin(distances)), position


def apply_rows(parameters, rows, features=None):
    """Correct each row in a Python loop."""
    out = []
    a = parameters.alpha
    for i, z in enumerate(np.asarray(rows, dtype=np.float64)):
        x = z if features is None else np.concatenate([z, np.asarray(features[i], dtype=np.float64)])
        k, p = nearest_row(x, parameters.mean, parameters.components, parameters.centroids)
        if parameters.mode == "full":
            mapped = parameters.weight[k] @ x + parameters.beta[k]
        else:
            mapped = parameters.gamma[k] * z + parameters.beta[k]
            if parameters.mode == "lowrank":
                mapped = mapped + (p @ parameters.core[k]) @ parameters.right
        out.append(z + a * (mapped - z))
    return np.array(out)


def fit_paper(z_q, z_fp, centroids):
    """Gamma and beta of each cluster and class, one at a time."""
    clusters, classes = len(centroids), z_q.shape[1]
    gamma, beta = np.ones((clusters, classes)), np.zeros((clusters, classes))
    labels = np.array([int(np.argmin(((row - centroids) ** 2).sum(axis=1))) for row in z_q])
    for k in range(clusters):
        members = labels == k
        if not members.any():
            continue
        for c in range(classes):
            q, f = z_q[members, c], z_fp[members, c]
            variance = q.var()
            if variance > 0:
                gamma[k, c] = ((q - q.mean()) * (f - f.mean())).mean() / variance
            beta[k, c] = f.mean() - gamma[k, c] * q.mean()
    return gamma, beta


def random_parameters(mode, rng, *, classes=10, clusters=5, components=4, rank=3, features=0):
    """Parameters of the given mode with random arrays."""
    from cat_plugin.cluster_affine import AffineParameters

    inputs = classes + features
    width = components or inputs
    arrays = {
        "mean": rng.normal(size=inputs),
        "components": np.linalg.qr(rng.normal(size=(inputs, inputs)))[0][:components],
        "centroids": rng.normal(size=(clusters, width)),
        "beta": rng.normal(size=(clusters, classes)),
    }
    if mode == "full":
        arrays["weight"] = rng.normal(size=(clusters, classes, inputs))
    else:
        arrays["gamma"] = rng.normal(size=(clusters, classes))
    if mode == "lowrank":
        arrays["core"] = rng.normal(size=(clusters, width, rank))
        arrays["right"] = rng.normal(size=(rank, classes))
    return AffineParameters(mode=mode, alpha=0.7, **arrays)
