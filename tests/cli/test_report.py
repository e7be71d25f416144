"""``cat-ptq report`` on the digits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cat_plugin.cli import main

AsJson = Callable[..., dict[str, Any]]
FACTORY = "examples.digits.model:build"


def test_report_of_the_bundle_alone(workspace: Path, tmp_path: Path, as_json: AsJson) -> None:
    out = tmp_path / "pages" / "report.html"
    found = as_json("report", workspace / "bundle", "--out", out)
    assert found["bytes"] == out.stat().st_size
    page = out.read_text(encoding="utf-8")
    assert 'id="clusters"' in page
    assert 'id="layers"' in page
    assert "no compiled library was given" in page
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]


def test_report_with_everything(workspace: Path, library: Path, tmp_path: Path, as_json: AsJson) -> None:
    bundle, data = workspace / "bundle", workspace / "test.npz"
    found = as_json(
        "report", bundle, "--data", data, "--library", library, "--compare", bundle, "--model", FACTORY,
        "--weights", workspace / "digits.safetensors", "--out", tmp_path / "r.html", "--batch", "1", "--seconds", "0",
    )  # fmt: skip
    accuracy = as_json("evaluate", bundle, "--data", data)
    for evaluation in found["evaluations"]:
        assert 100 * evaluation["score"] == pytest.approx(accuracy["top1_percent"])
        assert 100 * evaluation["plain"] == pytest.approx(accuracy["top1_percent_without_correction"])
    assert [row["batch"] for row in found["latency"]] == [1, 1, 1]
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert f"{accuracy['top1_percent']:.2f} %" in page
    for section in ("accuracy", "labels", "layers", "losses", "clusters", "correction", "speed", "origin"):
        assert f'id="{section}"' in page


def test_bundle_of_an_earlier_release(workspace: Path, tmp_path: Path, as_json: AsJson) -> None:
    """A bundle without report.json is still read, and the page says what is not known."""
    old = tmp_path / "old"
    shutil.copytree(workspace / "bundle", old)
    (old / "report.json").unlink()
    manifest = json.loads((old / "manifest.json").read_text())
    del manifest["files"]["report.json"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    as_json("report", old, "--out", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert 'id="correction"' in page
    assert "the bundle has no record of it" in page


def test_record_of_another_form(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A forger can write hashes that fit; the record is checked before anything is made of it."""
    import hashlib

    forged = tmp_path / "forged"
    shutil.copytree(workspace / "bundle", forged)
    record = json.dumps({"clusters": {"points": "everywhere"}}).encode()
    (forged / "report.json").write_bytes(record)
    manifest = json.loads((forged / "manifest.json").read_text())
    manifest["files"]["report.json"] = {"sha256": hashlib.sha256(record).hexdigest(), "size": len(record)}
    (forged / "manifest.json").write_text(json.dumps(manifest))
    assert main(["report", str(forged), "--out", str(tmp_path / "r.html")]) == 2
    assert "not as expected" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compare", "x"], "--data"),
        (["--weights", "x"], "--model"),
        (["--out", "."], "is a directory"),
        (["--library", "missing.so"], "missing"),
    ],
)
def test_bad_reports(
    workspace: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    pytest.importorskip("tvm", reason="TVM is not installed")
    assert main(["report", str(workspace / "bundle"), *words]) == 2
    assert message in capsys.readouterr().err


def test_unlabelled_data(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "x.npz", inputs=np.zeros((2, 1, 8, 8), np.float32))
    words = [
        "report",
        str(workspace / "bundle"),
        "--data",
        str(tmp_path / "x.npz"),
        "--out",
        str(tmp_path / "r.html"),
    ]
    assert main(words) == 2
    assert "no labels" in capsys.readouterr().err
