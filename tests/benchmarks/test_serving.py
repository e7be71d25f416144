"""Rows of the server's load test."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("aiohttp", reason="aiohttp is not installed")

from benchmarks import serving


def found(resident: list[tuple[float, int]], **statuses: int) -> dict[str, Any]:
    return {
        "statuses": statuses, "rate": 9.5, "p50_ms": 1.0, "p99_ms": 2.0, "most_ms": 3.0, "resident": resident,
    }  # fmt: skip


def test_growth_is_counted_from_when_the_memory_has_settled():
    megabytes = 1 << 20
    resident = [
        (0.0, 100 * megabytes),
        (30.0, 150 * megabytes),
        (61.0, 200 * megabytes),
        (600.0, 202 * megabytes),
    ]
    row = serving.row_of(10.0, 600.0, found(resident, **{"200": 5990, "503": 8, "not_sent": 2}), 0.25)
    assert (row["grown_mb"], row["resident_mb"]) == (2.0, 202.0)
    assert (row["answered"], row["refused"]) == (5990, 10)
    assert serving.row_of(10.0, 60.0, found(resident[:2], **{"200": 600}), 0.0)["grown_mb"] == 0.0


def test_a_second_on_a_server_of_its_own_becomes_a_row(digits_library: Any, tmp_path: Any) -> None:
    out = tmp_path / "serving.json"
    for rate in ("20", "40"):
        serving.main([str(digits_library), "--rates", rate, "--seconds", "1", "--out", str(out)])
    slow, fast = json.loads(out.read_text())["rows"]
    assert (slow["asked"], slow["answered"], slow["refused"]) == (20.0, 20, 0)
    assert (fast["asked"], fast["answered"]) == (40.0, 40)
    assert fast["resident_mb"] > 1


def test_a_server_that_does_not_come_up_is_said(tmp_path: Any) -> None:
    with pytest.raises(RuntimeError, match="does not answer"), serving.serving(tmp_path / "none.so"):
        pass
