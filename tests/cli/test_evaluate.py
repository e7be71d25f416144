"""``cat-ptq evaluate``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cat_plugin.cli import main

AsJson = Callable[..., dict[str, Any]]


def test_evaluate_measures_the_corrected_model(workspace: Path, as_json: AsJson) -> None:
    found = as_json("evaluate", str(workspace / "bundle"), "--data", str(workspace / "test.npz"))
    assert found["samples"] == 600
    assert found["top1_percent"] > 90


def test_full_precision_is_measured_beside_a_bundle_or_alone(workspace: Path, as_json: AsJson) -> None:
    network = ["--model", "examples.digits.model:build", "--weights", workspace / "digits.safetensors"]
    data = ["--data", workspace / "test.npz"]
    alone = as_json("evaluate", *network, *data)
    assert alone["samples"] == 600
    assert alone.keys() == {"top1_percent_full_precision", "samples"}
    beside = as_json("evaluate", workspace / "bundle", *network, *data)
    assert beside["top1_percent_full_precision"] == alone["top1_percent_full_precision"] > 95
    assert beside["top1_percent"] > 90


def test_other_metrics(
    workspace: Path, tmp_path: Path, as_json: AsJson, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["evaluate", workspace / "bundle", "--data", workspace / "test.npz"]
    top1 = as_json(*words)["top1_percent"]
    assert as_json(*words, "--metric", "top5")["top5_percent"] >= top1
    assert as_json(*words, "--metric", "macro_f1")["macro_f1_percent"] == pytest.approx(top1, abs=3)
    (tmp_path / "half.py").write_text(
        "def right(logits, labels):\n    return 0.5 * (logits.argmax(1) == labels).mean()\n"
    )
    monkeypatch.chdir(tmp_path)
    found = as_json(*words, "--metric", "half:right")
    assert found["score"] == pytest.approx(top1 / 200)
    assert found["score_without_correction"] <= 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to evaluate"),
        (["bundle", "--weights", "x"], "--weights without --model"),
        (["bundle", "--metric", "top2"], "is none of top1, top5, macro_f1, miou"),
        (["bundle", "--metric", "miou", "--data", "pixels.npz"], "expected labels of shape"),
    ],
)
def test_bad_evaluations(
    workspace: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str, tmp_path: Path
) -> None:
    pixels = tmp_path / "pixels.npz"
    with np.load(workspace / "test.npz") as arrays:
        np.savez(pixels, inputs=arrays["inputs"][:4], labels=np.zeros((4, 8, 8), int))
    given = [
        {"bundle": str(workspace / "bundle"), "pixels.npz": str(pixels)}.get(word, word) for word in words
    ]
    data = [] if "--data" in words else ["--data", str(workspace / "test.npz")]
    assert main(["evaluate", *given, *data]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
