"""``cat-ptq evaluate``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("neural_compressor", reason="Neural Compressor is not installed")

from cat_plugin.cli import main

from .conftest import quantize_words

AsJson = Callable[..., dict[str, Any]]


def test_evaluate_measures_the_corrected_model(workspace: Path, as_json: AsJson) -> None:
    found = as_json("evaluate", str(workspace / "bundle"), "--data", str(workspace / "test.npz"))
    assert found["samples"] == 600
    assert found["top1_percent"] > 90


def test_evaluate_prepares_images_as_the_calibration_was(
    workspace: Path, tmp_path: Path, as_json: AsJson
) -> None:
    """The same digits as stored images: mean and deviation are given once, when quantizing."""
    for name in ("calibration", "test"):
        with np.load(workspace / f"{name}.npz") as arrays:
            pixels = np.rint((arrays["inputs"] * 6.017 + 4.884) * 255 / 16).astype(np.uint8)
            rest = {"labels": arrays["labels"]} if "labels" in arrays.files else {}
            np.savez(tmp_path / f"{name}.npz", images=pixels.transpose(0, 2, 3, 1), **rest)
    changes = {"data": str(tmp_path / "calibration.npz"), "out": str(tmp_path / "bundle")}
    scale = {"mean": str(4.884 / 16), "std": str(6.017 / 16)}
    assert main([*quantize_words(workspace, **changes, **scale), "--no-measure"]) == 0
    found = as_json("evaluate", tmp_path / "bundle", "--data", tmp_path / "test.npz")
    assert found["top1_percent"] > 90
    wrong = as_json(
        "evaluate", tmp_path / "bundle", "--data", tmp_path / "test.npz", "--mean", "0", "--std", "20"
    )
    assert wrong["top1_percent"] < found["top1_percent"]
