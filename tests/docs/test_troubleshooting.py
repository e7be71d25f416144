"""Troubleshooting has every message of the code, and explains none that the code no longer raises."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from .messages import GAP, PAGE, ROOT, explained, pattern, raised, with_list

MESSAGES = explained(PAGE.read_text("utf-8"))


def texts(path: Path) -> Iterator[str]:
    """Every string of a file, with a mark in the place of what is filled in."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.fixture(scope="module")
def source() -> list[str]:
    files = [path for package in ("cat_plugin", "tvm_backend") for path in (ROOT / package).rglob("*.py")]
    return [text for path in files for text in texts(path)]


@pytest.mark.parametrize("message", MESSAGES)
def test_message_is_still_raised(message: str, source: list[str]) -> None:
    assert any(pattern(message).search(text) for text in source), "no string of the code reads so"


def test_the_check_can_fail() -> None:
    assert len(MESSAGES) > 30
    assert pattern("the ... model returned").search(f"the {GAP} model returned")
    assert not pattern("the ... model returned").search("the model returned")


def test_every_message_of_the_code_is_there() -> None:
    """Explained or listed; ``python -m tests.docs.messages`` writes the list."""
    page = PAGE.read_text("utf-8")
    assert with_list(page) == page


def test_raise_sites_are_found() -> None:
    found = raised()
    assert len(found) > 300
    assert (
        found["the data has no labels; add an array named labels, or class folders, to measure accuracy"]
        == "Reports"
    )
    assert any("yielded no batch" in text for text in found)
