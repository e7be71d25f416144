"""What the figures are drawn from."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cat_plugin.report.svg.charts import frontier


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1)), min_size=1, max_size=12))
def test_frontier(points: list[tuple[int, float]]) -> None:
    best = frontier(points)
    beaten = {p for p in points if any(o[0] <= p[0] and o[1] >= p[1] and o != p for o in points)}
    assert sorted(set(best)) == sorted(set(points) - beaten)
