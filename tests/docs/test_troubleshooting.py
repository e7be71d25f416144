"""The messages that the troubleshooting page explains are those that the code raises."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
HEADING = re.compile(r"^### `(.*)`$", re.MULTILINE)
MESSAGES = HEADING.findall(PAGE.read_text("utf-8"))
GAP = "\0"


def texts(path: Path) -> Iterator[str]:
    """Every string of a file, with a mark in the place of what is filled in."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.fixture(scope="module")
def source() -> list[str]:
    files = [path for package in ("cat_plugin", "tvm_backend") for path in (ROOT / package).rglob("*.py")]
    return [text for path in files for text in texts(path)]


def pattern(message: str) -> re.Pattern[str]:
    """A quoted message as it stands in the code: something is filled in wherever the page has three dots."""
    parts = (re.escape(part.strip()) for part in message.split("..."))
    return re.compile(rf"\s?{GAP}.{{0,60}}?".join(parts), re.DOTALL)


@pytest.mark.parametrize("message", MESSAGES)
def test_message_is_still_raised(message: str, source: list[str]) -> None:
    assert any(pattern(message).search(text) for text in source), "no string of the code reads so"


def test_the_check_can_fail() -> None:
    assert len(MESSAGES) > 30
    assert pattern("the ... model returned").search(f"the {GAP} model returned")
    assert not pattern("the ... model returned").search("the model returned")
