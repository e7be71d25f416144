"""Rows of a benchmark in its JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks import rows


def _read(path: Path) -> list[tuple[str, int]]:
    return [(row["row"], row["score"]) for row in json.loads(path.read_text())["rows"]]


def test_rows_take_the_place_of_those_of_their_names_and_stand_in_order(tmp_path):
    path, order = tmp_path / "made" / "rows.json", ["first", "second", "third"]
    rows.merge(path, [{"row": "third", "score": 3}, {"row": "unlisted", "score": 9}], order)
    rows.merge(path, [{"row": "first", "score": 1}, {"row": "third", "score": 4}], order)
    assert _read(path) == [("first", 1), ("third", 4), ("unlisted", 9)]


def test_rows_measured_side_by_side_are_kept_and_a_failed_one_loses_no_other(tmp_path):
    path = tmp_path / "rows.json"
    program = (
        "import json, sys; json.dump({'rows': [{'row': sys.argv[1], 'score': 1}]}, open(sys.argv[2], 'w'))"
    )

    def command(name: str, part: Path) -> list[str]:
        return [sys.executable, "-c", program if name != "broken" else "raise SystemExit(1)", name, str(part)]

    rows.side_by_side(
        ["b", "broken", "a"], command, lambda found: rows.merge(path, found, ["a", "b"]), 3, None
    )
    assert _read(path) == [("a", 1), ("b", 1)]
    rows.side_by_side(["c"], command, lambda found: rows.merge(path, found, []), 1, -1.0)
    assert _read(path) == [("a", 1), ("b", 1)]
