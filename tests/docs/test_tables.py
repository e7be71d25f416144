"""Measured tables in the pages are those of the JSON beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.tables import fill, speeds

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    page
    for page in (ROOT / "README.md", *(ROOT / "benchmarks").glob("*.md"), *(ROOT / "docs").rglob("*.md"))
    if any(f"<!-- {kind} " in page.read_text("utf-8") for kind in ("table", "speeds"))
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_are_up_to_date(page: Path) -> None:
    text = page.read_text("utf-8")
    assert fill(text) == text, f"run: python -m benchmarks.tables {page.relative_to(ROOT)}"


def test_speeds_stand_beside_each_other_and_the_fastest_at_8_bits_is_bold() -> None:
    rows = [
        {"model": "net", "batch": batch, "peer": peer, "precision": precision, "ms": ms}
        for peer, precision, batch, ms in (
            ("cat-ptq", "w8a8", 1, 0.5),
            ("cat-ptq", "w8a8", 16, 7.25),
            ("cat-ptq", "w2a2", 1, 0.25),
            ("openvino", "int8", 1, 0.75),
            ("openvino", "int8", 16, 7.0),
        )
    ]
    found = speeds(rows, ["cat-ptq/w8a8", "cat-ptq/w2a2", "openvino/int8"]).splitlines()
    assert found[0] == "| ms at batch 1 / 16 | cat-ptq w8a8 | cat-ptq w2a2 | openvino int8 |"
    assert found[2:] == ["| net | **0.5** / 7.25 | 0.25 / - | 0.75 / **7** |"]
