"""Rows of the peers are merged: what was measured again replaces what it repeats, all else stays."""

from pathlib import Path

from benchmarks.peers.merging import merge, merge_into


def test_rows_measured_again_replace_those_about_the_same() -> None:
    old = [
        {"peer": "a", "model": "m", "w_bits": 8, "a_bits": 8, "method": "x", "top1": 1.0},
        {"peer": "b", "model": "m", "w_bits": 8, "a_bits": 8, "method": "x", "top1": 2.0},
        {"peer": "a", "model": "m", "w_bits": 4, "a_bits": 8, "method": "x", "top1": 3.0},
    ]
    new = [{**old[2], "top1": 4.0}, {**old[0], "method": "y", "top1": 5.0}]
    assert [row["top1"] for row in merge(old, new)] == [1.0, 2.0, 4.0, 5.0]
    assert merge([], new) == new


def test_a_file_holds_old_rows_and_new(tmp_path: Path) -> None:
    path = tmp_path / "made" / "rows.json"
    row = {"peer": "a", "model": "m", "bits": "W4", "method": "x", "score": 1.0}
    merge_into(path, [row, {**row, "bits": "W3"}], {"cpu": "theirs"})
    assert [each["score"] for each in merge_into(path, [{**row, "score": 2.0}])] == [2.0, 1.0]
