"""Latencies beside busy programs: every runtime is measured, or says why not."""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import Any

import pytest

pytest.importorskip("tvm", reason="TVM is not installed")

from benchmarks import busy
from benchmarks.tables import table


def test_every_combination_is_a_row_and_what_cannot_run_says_so(
    digits_library: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, missing = tmp_path / "busy.json", tmp_path / "none.onnx"
    words = [
        "--onnx",
        str(missing),
        "--threads",
        "1",
        "--hogs",
        "0,1",
        "--seconds",
        "0.05",
        "--out",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", ["busy", str(digits_library), *words])
    busy.main()
    found = json.loads(out.read_text())["rows"]
    assert [(row["runtime"], row["hogs"]) for row in found] == [
        (name, hogs) for hogs in (0, 1) for name in ("cat-ptq", "ONNX Runtime", "OpenVINO")
    ]
    for row in found:
        if row["runtime"] == "cat-ptq":
            assert 0 < row["p50_ms"] <= row["p99_ms"]
            assert row["calls"] > 1
        else:
            assert row["reason"]
    if importlib.util.find_spec("onnxruntime"):
        assert "none.onnx" in found[1]["reason"]
    shown = table(found, ["runtime", "hogs", "p50_ms", "p99_ms"])
    assert shown.count("| cat-ptq |") == 2
    assert "cat-ptq" in capsys.readouterr().out


def test_hogs_work_while_the_block_runs_and_end_with_it() -> None:
    with busy._hogs(2) as beside:
        assert [hog.poll() for hog in beside] == [None, None]
    assert None not in [hog.poll() for hog in beside]
