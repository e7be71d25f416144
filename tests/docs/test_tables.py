"""Measured tables in the pages are those of the JSON beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.tables import fill

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    page
    for page in (ROOT / "README.md", *(ROOT / "benchmarks").glob("*.md"), *(ROOT / "docs").rglob("*.md"))
    if "<!-- table " in page.read_text("utf-8")
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_are_up_to_date(page: Path) -> None:
    text = page.read_text("utf-8")
    assert fill(text) == text, f"run: python -m benchmarks.tables {page.relative_to(ROOT)}"
