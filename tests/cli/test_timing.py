"""Percentiles of the time of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cat_plugin.cli.timing import latency

AsJson = Callable[..., dict[str, Any]]


def test_latency_takes_percentiles_of_calls() -> None:
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1

    found = latency(call, 0.0)
    assert found["calls"] == 20
    assert calls == 25
    assert 0 < found["p10_ms"] <= found["median_ms"] <= found["p90_ms"]
