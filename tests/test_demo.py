"""The demo, run as a newcomer runs it, and what it must show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("demo")
    script = ROOT / "examples" / "digits" / "run.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # so that it also runs where nothing is installed
    subprocess.run(
        [sys.executable, str(script), "--output", str(output)], check=True, cwd=output, env=environment
    )
    assert (output / "results.png").read_bytes().startswith(b"\x89PNG")
    loaded = json.loads((output / "results.json").read_text())
    loaded["output"] = output
    return loaded


def test_full_precision_accuracy(results: dict[str, Any]) -> None:
    assert results["fp"]["top1"] > 97


def test_both_bit_widths_were_tried(results: dict[str, Any]) -> None:
    assert [row["name"] for row in results["rows"]] == ["W4A4", "W2A2"]
    for row in results["rows"]:
        assert row["corrected_top1"] > 90
        manifest = json.loads(
            (results["output"] / row["name"].lower() / "bundle" / "manifest.json").read_text()
        )
        inner = manifest["layers"][1:-1]
        expected = (int(row["name"][1]), int(row["name"][3]))
        assert {(layer["w_bits"], layer["a_bits"]) for layer in inner} == {expected}
        assert manifest["cluster_affine"] is not None


def test_library_agrees_with_pytorch_on_the_whole_test_split(results: dict[str, Any]) -> None:
    # 600 images: 99.9 % leaves room for none.
    for row in results["rows"]:
        assert row["library_differs_on"] == []
        assert row["library_top1"] == row["corrected_top1"]


def test_the_correction_repairs_what_somebody_else_quantized(results: dict[str, Any]) -> None:
    three, two = results["elsewhere"]
    assert two["corrected_top1"] > two["quantized_top1"] + 5
    assert three["corrected_top1"] >= three["quantized_top1"]


def test_weights_shrink(results: dict[str, Any]) -> None:
    four, two = (row["weight_bytes"] for row in results["rows"])
    assert two < four < results["fp"]["weight_bytes"] / 7
