"""``cat-ptq run``: a library says what the bundle says."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cat_plugin.cli import main

AsJson = Callable[..., dict[str, Any]]


def test_compile_and_run_agree_with_pytorch(
    workspace: Path, library: Path, tmp_path: Path, as_json: AsJson
) -> None:
    bundle, data = workspace / "bundle", workspace / "test.npz"
    ran = as_json("run", library, "--input", data, "--out", tmp_path / "logits")
    evaluated = as_json("evaluate", bundle, "--data", data)
    assert ran["top1_percent"] == pytest.approx(evaluated["top1_percent"], abs=0.2)
    with np.load(tmp_path / "logits.npz") as arrays:
        assert arrays["logits"].argmax(1).tolist() == ran["predictions"]
    assert [path.name for path in tmp_path.iterdir()] == ["logits.npz"]


def test_verify_wants_the_rows_beside_the_library(
    workspace: Path, library: Path, tmp_path: Path, as_json: AsJson, capsys: pytest.CaptureFixture[str]
) -> None:
    data = workspace / "test.npz"
    assert as_json("run", library, "--input", data, "--verify")["samples"] > 0
    for suffix in (".so", ".json"):
        shutil.copy(library.with_suffix(suffix), tmp_path / f"{library.stem}{suffix}")
    assert main(["run", str(tmp_path / library.name), "--input", str(data), "--verify"]) == 2
    assert "checks.safetensors is missing" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "benchmark"])
def test_a_bundle_is_named_as_one(workspace: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    words = {"run": ["--input", str(workspace / "test.npz")], "benchmark": []}[command]
    assert main([command, str(workspace / "bundle"), *words]) == 2
    assert "is a bundle: compile it first" in capsys.readouterr().err
