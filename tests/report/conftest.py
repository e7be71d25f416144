"""A report with every section, made by hand: numbers that are easy to find again in the page."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cat_plugin.report.clusters import cluster_summary
from cat_plugin.report.content import Content, Evaluation
from cat_plugin.report.images import thumbnails
from cat_plugin.report.record import label_changes

NASTY = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>&\"'"


def layer(name: str, w_bits: int | None, a_bits: int | None, *shape: int) -> dict[str, Any]:
    return {
        "name": f"model.{name}",
        "kind": "conv2d",
        "w_bits": w_bits,
        "a_bits": a_bits,
        "weight_shape": list(shape),
    }


@pytest.fixture
def content() -> Content:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(200, 4))
    clusters = (z[:, 0] > 0).astype(int)
    labels = np.array([0, 1, 2, 3, 0, 1])
    said = {
        "full": np.array([0, 1, 2, 3, 0, 2]),
        "quantized": np.array([0, 1, 2, 0, 0, 1]),
        "corrected": np.array([0, 1, 2, 3, 3, 1]),
    }
    trials = [
        {"name": f"W{bits}A4 fast", "config": {"w_bits": bits, "preset": "fast"}, "score": score, "uncorrected": score - 0.01,
         "seconds": 1.25, "met": score > 0.85, "best": bits == 2, "weight_bytes": 1000 * bits}
        for bits, score in ((4, 0.9125), (2, 0.875))
    ]  # fmt: skip
    times = {"median_ms": 0.125, "p10_ms": 0.1, "p90_ms": 0.2, "calls": 100, "threads": 2}
    slower = {"median_ms": 1.5, "p10_ms": 1.25, "p90_ms": 2.0, "calls": 100, "threads": 2}
    return Content(
        name="digits",
        manifest={
            "layers": [layer("stem", 8, 8, 16, 1, 3, 3), layer("body", 2, 4, 32, 16, 3, 3)],
            "cluster_affine": {"op": "cluster_affine", "alpha": 0.4, "shapes": {"beta": [2, 4]}},
            "calibration": {"samples": 200},
            "libraries": {"cat-ptq": "0.1.0"},
            "files": {"model.pt2": {"sha256": "0" * 64, "size": 10}},
        },
        record={
            "version": 1,
            "model": {"name": "mine:build", "parameters": 10},
            "recipe": {"name": "recipe.yaml", "text": "algorithm: cat\n"},
            "engine": {
                "layers": [
                    {"name": "stem", "loss_before": 0.001, "loss_after": 0.0001},
                    {"name": "body", "loss_before": 0.25, "loss_after": 0.1},
                ],
                "units": [
                    {"name": "body", "kind": "unit", "loss_before": 0.5, "loss_after": 0.0625, "steps": 7, "note": ""},
                    {"name": "model", "kind": "model", "loss_before": 0.5, "loss_after": 0.4, "steps": 7, "note": "x"},
                ],
                "notes": ["something to know"],
                "unquantized": [],
                "num_samples": 200,
                "seconds": 12.5,
            },
            "tuning": {"source": "tune.npz", "samples": 50, "baseline": 0.9375, "target": 0.928, "trials": trials},
            "sensitivity": {
                "rows": 128,
                "layers": [
                    {"name": "stem", "divergence": 0.00123, "changed": 0.0},
                    {"name": "body", "divergence": 0.0456, "changed": 0.05},
                ],
            },
            "clusters": cluster_summary(z, z * 1.1, clusters, z * 1.3),
            "outliers": {"rows": 128, "layers": [{"name": "blocks.0.fc1", "before": 122.5, "after": 8.25}]},
        },
        arrays={"gamma": 1 + 0.1 * rng.normal(size=(2, 4)), "beta": rng.normal(size=(2, 4))},
        source="test.npz",
        samples=6,
        evaluations=[
            Evaluation("digits", "W2A4", 1152, 0.8765, 0.8642),
            Evaluation("other", "W4A4", 2304, 0.9012, None),
        ],
        full_score=0.9433,
        conditions={"processor": "A Fast One", "cpus": 4, "load": 1.25},
        labels={**label_changes(labels, said), "source": "test.npz"},
        pictures=dict(zip((3, 4, 5), thumbnails(rng.normal(size=(3, 1, 8, 8))) or (), strict=True)),
        latency=[
            {"runtime": "compiled library", "batch": 1, **times},
            {"runtime": "PyTorch, quantized graph", "batch": 1, **slower},
        ],
        library={
            "name": "digits.so",
            "bytes": 2048,
            "manifest": {
                "variants": [{"variant": "", "target": "znver5"}],
                "kernels": [{"name": "conv", "variant": "vnni", "output": [16, 8, 8], "weight_bits": 2, "weight_bytes": 64, "operations": 1e6}],
                "float_ops": ["softmax"],
            },
        },
        written="now",
    )  # fmt: skip
