"""Figures of the correction: where the clusters lie and what it moves, and the range of its slopes and offsets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from cat_plugin.report.figures import percent, short
from cat_plugin.report.svg.axes import Scale, bottom_axis, left_axis, linear
from cat_plugin.report.svg.charts import WIDTH, figure
from cat_plugin.report.svg.element import element, join

__all__ = ["cluster_map", "enlargement", "slopes_and_offsets", "spread"]

FloatArray = NDArray[np.floating[Any]]


def enlargement(summary: Mapping[str, Any]) -> int:
    """How many times longer the moves of clusters are drawn than they are, so that they can be seen."""
    means = summary["means"]
    dots = np.array([point[:2] for point in summary["points"]], float).reshape(-1, 2)
    extent = float(np.ptp(np.percentile(dots, [1, 99], axis=0), axis=0).max()) if len(dots) else 0.0
    moves = [math.dist(m["quantized"], m[key]) for m in means for key in ("corrected", "full") if key in m]
    longest = max(moves, default=0.0)
    if longest <= 0 or longest > extent / 40:
        return 1
    return max(
        factor for factor in (1, 2, 5, 10, 20, 50, 100) if factor == 1 or longest * factor <= extent / 12
    )


def _enlarged(mean: Mapping[str, Any], factor: int) -> dict[str, Any]:
    start = mean["quantized"]
    moved = {
        key: [a + factor * (b - a) for a, b in zip(start, mean[key], strict=True)]
        for key in ("corrected", "full")
        if key in mean
    }
    return {**mean, **moved}


def cluster_map(summary: Mapping[str, Any]) -> Markup:
    """Samples as dots; for each cluster an arrow from the mean of its logits to the mean of the corrected ones."""
    left, right, top, bottom = 64, WIDTH - 24, 40, 560
    factor = enlargement(summary)
    true_means = {mean["cluster"]: mean for mean in summary["means"]}
    means = [_enlarged(mean, factor) for mean in summary["means"]]
    parts_of = ("quantized", "corrected", "full")
    # Scales are those of the means and of the bulk of the dots: a few far ones must not press the rest together.
    dots = np.array([point[:2] for point in summary["points"]], float).reshape(-1, 2)
    bulk = np.percentile(dots, [1, 99], axis=0) if len(dots) else np.zeros((0, 2))
    ends = np.array([mean[key] for mean in means for key in parts_of if key in mean], float).reshape(-1, 2)
    everything = np.concatenate([bulk, ends])
    x = linear(everything[:, 0].tolist(), left, right)
    y = linear(everything[:, 1].tolist(), bottom, top)
    explained = summary["explained"]
    title = [f"{name} principal component ({percent(share, 0)} of the variance)" for name, share in zip(("first", "second"), explained, strict=True)]  # fmt: skip
    by_cluster: dict[int, list[list[float]]] = {}
    for point in summary["points"]:
        by_cluster.setdefault(int(point[2]), []).append(point)
    groups = []
    for mean in means:
        number = mean["cluster"]
        start, end = _at(x, y, mean["quantized"]), _at(x, y, mean["corrected"])
        true = true_means[number]
        text = f"cluster {number}: {mean['rows']} samples, moved by {short(math.dist(true['quantized'], true['corrected']))}"
        if "full" in mean:
            away = [short(math.dist(true[key], true["full"])) for key in ("quantized", "corrected")]
            text += f"; from full precision {away[0]} before, {away[1]} after"
        inside: list[object] = [element("title", text)]
        inside += [
            element("circle", class_="dot", cx=x(point[0]), cy=y(point[1]), r=2.2)
            for point in by_cluster.get(number, ())
            if x.low <= point[0] <= x.high and y.low <= point[1] <= y.high
        ]
        if "full" in mean:
            goal = _at(x, y, mean["full"])
            inside.append(element("circle", class_="goal", cx=goal[0], cy=goal[1], r=6.5))
        inside.append(element("circle", class_="mark before", cx=start[0], cy=start[1], r=3.5))
        if math.dist(start, end) > 1:
            inside.append(
                element(
                    "line",
                    class_="arrow",
                    x1=start[0],
                    y1=start[1],
                    x2=end[0],
                    y2=end[1],
                    marker_end="url(#head)",
                )
            )
        inside.append(element("circle", class_="halo", cx=start[0], cy=start[1], r=14))
        groups.append(element("g", *inside, class_="cluster"))
    head = element(
        "marker",
        element("path", d="M0 0 8 4 0 8z", class_="head"),
        id="head", viewBox="0 0 8 8", refX=7, refY=4, markerWidth=8, markerHeight=8, orient="auto", markerUnits="userSpaceOnUse",
    )  # fmt: skip
    return figure(
        bottom + 48,
        "Clusters in the first two principal components of the quantized logits",
        element("defs", head),
        bottom_axis(x, top, bottom, title[0]),
        left_axis(y, left, right, title[1]),
        join(groups),
    )


def _at(x: Scale, y: Scale, point: Sequence[float]) -> tuple[float, float]:
    return x(point[0]), y(point[1])


def slopes_and_offsets(arrays: Mapping[str, FloatArray]) -> tuple[FloatArray, FloatArray] | None:
    """Slope and offset of every class in every cluster.

    Parameters
    ----------
    arrays : mapping of str to ndarray
        A bundle's ``cluster_affine.safetensors``.

    Returns
    -------
    gamma, beta : ndarray of shape (K, C), or None
        Of a full map, gamma is the diagonal: what a logit's own value is multiplied by.
    """
    beta = arrays.get("beta")
    gamma = arrays.get("gamma")
    if gamma is None and (weight := arrays.get("weight")) is not None and weight.ndim == 3:
        gamma = np.diagonal(weight[:, :, : weight.shape[1]], axis1=1, axis2=2)
    if beta is None or gamma is None or beta.ndim != 2 or gamma.shape != beta.shape or not beta.size:
        return None
    if not (np.isfinite(gamma).all() and np.isfinite(beta).all()):
        return None
    return gamma, beta


def spread(values: FloatArray, name: str, neutral: float) -> Markup:
    """For each cluster the range over its classes: least to greatest as a line, the middle half as a bar.

    Parameters
    ----------
    values : ndarray of shape (K, C)
        One parameter of the maps.
    name : str
        What it is called.
    neutral : float
        The value that changes nothing, drawn as a line.
    """
    left, right, top, bottom = 64, WIDTH - 24, 40, 210
    clusters = len(values)
    y = linear([float(values.min()), float(values.max()), neutral], bottom, top)
    x = Scale(-0.5, clusters - 0.5, left, right)
    width = min((right - left) / clusters * 0.5, 14)
    parts: list[object] = [
        left_axis(y, left, right, name, count=4),
        element("line", class_="neutral", x1=left, x2=right, y1=y(neutral), y2=y(neutral)),
    ]
    every = max(1, math.ceil(clusters / 24))
    for number, row in enumerate(values):
        at = x(number)
        least, low, middle, high, most = np.percentile(row, [0, 25, 50, 75, 100]).tolist()
        text = f"cluster {number}: {short(least)} to {short(most)}, median {short(middle)}"
        parts.append(
            element(
                "g",
                element("title", text),
                element("line", class_="whisker", x1=at, x2=at, y1=y(least), y2=y(most)),
                element("rect", class_="bar", x=at - width / 2, y=y(high), width=width, height=max(y(low) - y(high), 1.5), rx=2),
                element("line", class_="median", x1=at - width / 2, x2=at + width / 2, y1=y(middle), y2=y(middle)),
            )
        )  # fmt: skip
        if number % every == 0:
            parts.append(
                element("text", str(number), class_="tick", x=at, y=bottom + 16, text_anchor="middle")
            )
    parts.append(
        element("text", "cluster", class_="axis", x=(left + right) / 2, y=bottom + 36, text_anchor="middle")
    )
    return figure(bottom + 48, f"{name} by cluster", *parts)
