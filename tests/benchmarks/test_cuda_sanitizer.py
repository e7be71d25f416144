"""What compute-sanitizer finds in the models of a CUDA run."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cuda_sanitizer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a shell script takes the sanitizer's place")

SCRIPT = """#!/bin/sh
echo "========= COMPUTE-SANITIZER"
case "$*" in
*slow*) sleep 60;;
*initcheck*wrong*)
  echo "========= Uninitialized __global__ memory read of size 4 bytes"
  echo "=========     at kernel+0xbd0 by thread (0,0,0) in block (2,3,0)"
  echo "========= ERROR SUMMARY: 1 error"
  exit 9;;
*broken*) echo "no such library"; exit 1;;
esac
echo "========= ERROR SUMMARY: 0 errors"
"""


def _rows(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, seconds: float = 60
) -> list[tuple[Any, ...]]:
    program = folder / "compute-sanitizer"
    program.write_text(SCRIPT)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    rows: list[dict[str, Any]] = []
    cuda_sanitizer.sanitize([folder / f"{name}.so"], time.monotonic() + seconds, rows.append)
    return [(row["name"], row["correct"], row["fault"]) for row in rows]


def test_errors_are_told_with_their_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = "Uninitialized __global__ memory read of size 4 bytes; at kernel+0xbd0 by thread (0,0,0) in block (2,3,0)"
    found = _rows(tmp_path, monkeypatch, "wrong")
    assert found == [("wrong, initcheck", False, fault), ("wrong, memcheck", True, None)]


def test_a_run_that_fails_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _, correct, fault in _rows(tmp_path, monkeypatch, "broken"):
        assert correct is False
        assert "no such library" in fault


def test_what_takes_too_long_is_ended_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _rows(tmp_path, monkeypatch, "slow", 0.5)
    assert [row[1:] for row in found] == [(None, "not reached in the time there was")] * 2
