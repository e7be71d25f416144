"""Rows of the peers are merged: what was measured again replaces what it repeats, all else stays."""

from benchmarks.peers.__main__ import merge


def test_rows_measured_again_replace_those_about_the_same() -> None:
    old = [
        {"peer": "a", "model": "m", "w_bits": 8, "a_bits": 8, "method": "x", "top1": 1.0},
        {"peer": "b", "model": "m", "w_bits": 8, "a_bits": 8, "method": "x", "top1": 2.0},
        {"peer": "a", "model": "m", "w_bits": 4, "a_bits": 8, "method": "x", "top1": 3.0},
    ]
    new = [{**old[2], "top1": 4.0}, {**old[0], "method": "y", "top1": 5.0}]
    assert [row["top1"] for row in merge(old, new)] == [1.0, 2.0, 4.0, 5.0]
    assert merge([], new) == new
