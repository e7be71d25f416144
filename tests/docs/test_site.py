"""What the site promises can be checked without building it: pages, links and the API reference are complete."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
MARKDOWN = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")
PACKAGES = (
    "cat_plugin", "cat_plugin.cluster_affine", "cat_plugin.errors", "cat_plugin.graph", "cat_plugin.ptq", "tvm_backend",
)  # fmt: skip


def setting(name: str) -> dict[str, object]:
    """A literal of ``docs/conf.py``, which itself needs Sphinx."""
    for statement in ast.parse((DOCS / "conf.py").read_text("utf-8")).body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", "") == name:
            return ast.literal_eval(statement.value)
    raise AssertionError(f"docs/conf.py does not set {name}")


def test_every_page_is_in_the_side_bar() -> None:
    listed = {
        str(page.relative_to(DOCS).with_suffix(""))
        for pages in setting("NAVIGATION").values()
        for pattern in pages
        for page in (*DOCS.glob(f"{pattern}.md"), *DOCS.glob(f"{pattern}.rst"))
    }
    there = {
        str(page.relative_to(DOCS).with_suffix("")) for page in (*DOCS.rglob("*.md"), *DOCS.rglob("*.rst"))
    }
    assert there - listed == {"index"}


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    missing = [target for target, _ in LINK.findall(text) if not (page.parent / target).exists()]
    assert not missing


def test_pages_outside_the_site_have_a_place_in_it() -> None:
    for there, here in setting("OUTSIDE").items():
        assert (DOCS / there).is_file()
        assert (DOCS / str(here)).is_file()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_in_the_reference(package: str) -> None:
    pages = "\n".join(page.read_text("utf-8") for page in (DOCS / "api").glob("*.rst"))
    if f"automodule:: {package}\n   :members:" in pages:
        return
    found = re.findall(rf"^\.\. (?:auto\w+|py:data):: {package}\.(\w+)(?:\(.*\))?$", pages, re.M)
    assert set(importlib.import_module(package).__all__) <= set(found)
