"""Scales and their ticks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cat_plugin.report.svg.axes import Scale, linear, logarithmic


@given(
    st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=5),
    st.sampled_from(["linear", "log", "binary"]),
)
def test_scales(values: list[float], kind: str) -> None:
    if kind == "linear":
        scale = linear(values, 0, 100)
    else:
        scale = logarithmic(values, 0, 100, binary=kind == "binary")
    places = [scale(value) for value in sorted(values)]
    assert all(0 <= place <= 100 for place in places)
    assert places == sorted(places)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 20
    assert all(scale.low <= tick * (1 + 1e-9) and tick <= scale.high * (1 + 1e-3) for tick in ticks)


def test_round_ticks() -> None:
    assert Scale(0, 1, 0, 1).ticks(5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert Scale(1e-5, 0.2, 0, 1, log=True).ticks() == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
    assert Scale(15000, 300000, 0, 1, log=True, binary=True).ticks() == [16384, 32768, 65536, 131072, 262144]
