"""A segmentation net from the command line: its pixels are scored, corrected and evaluated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cat_plugin.cli import main


def test_a_segmentation_net_is_quantized_tuned_and_evaluated(
    tmp_path: Path, as_json: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    draw = np.random.default_rng(0)
    images = draw.standard_normal((40, 3, 16, 16)).astype(np.float32)
    np.savez(tmp_path / "calibration.npz", inputs=images)
    np.savez(tmp_path / "tune.npz", inputs=images[:8], labels=draw.integers(0, 4, (8, 16, 16)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "cat: {w_bits: 2, a_bits: 3, preset: fast, mode: diagonal, num_clusters: 2, alpha: 1.0, class_axis: 1}\n"
    )
    bundle = tmp_path / "bundle"
    words = ["--model", "tests.zoo.dense:UNet", "--data", tmp_path / "calibration.npz", "--out", bundle]
    tuned = ["--tune", tmp_path / "tune.npz", "--metric", "miou", "--allow-miss"]
    made = as_json("quantize", recipe, *words, *tuned)
    found = as_json("evaluate", bundle, "--data", tmp_path / "tune.npz", "--metric", "miou")
    (trial,) = made["trials"]
    assert found["miou_percent"] == pytest.approx(100 * trial["score"])
    assert found["miou_percent_without_correction"] == pytest.approx(100 * trial["uncorrected"])
    assert found["miou_percent"] != found["miou_percent_without_correction"]
    assert as_json("inspect", bundle)["cluster_affine"]["class_axis"] == 1
    recipe.write_text("cat: {w_bits: 4, preset: fast, logits: logit}\n")
    assert main(["quantize", str(recipe), *map(str, words)]) == 2
    assert "the model has no output 'logit'" in " ".join(capsys.readouterr().err.split())
