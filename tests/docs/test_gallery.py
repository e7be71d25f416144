"""The site's reports are laid out of what is stored, and the page names each of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def gallery() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gallery", DOCS / "_ext" / "gallery.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_report_is_laid_out_and_named(gallery: ModuleType) -> None:
    stored = gallery.reports()
    assert {"digits", "resnet20", "rounded"} == set(stored)
    text = (DOCS / "gallery.md").read_text("utf-8")
    for name, each in stored.items():
        assert f"| {name} |" in text
        page = gallery.page_of(each)
        corrected = () if name == "digits" else ("clusters", "correction")  # there no map gained
        assert all(f'id="{section}"' in page for section in ("layers", "losses", *corrected, "origin"))
    assert 'id="trials"' in gallery.page_of(stored["digits"])
