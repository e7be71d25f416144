"""Packs, chosen by score."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from cat_plugin.ptq.graph.packs import group_by_score


@given(st.lists(st.floats(0, 10), min_size=1, max_size=9))
@settings(deadline=None)
def test_packs_start_at_the_lowest_score_of_what_is_left_in_front(scores):
    packs = group_by_score(scores)
    assert [i for start, end in packs for i in range(start, end)] == list(range(len(scores)))
    for start, end in packs:
        assert scores[start] == min(scores[:end])
