"""The messages that the code raises, and the list of those that troubleshooting does not explain one by one.

``python -m tests.docs.messages`` writes the end of docs/troubleshooting.md anew.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from cat_plugin import errors

__all__ = ["GAP", "ROOT", "explained", "listed", "pattern", "raised"]

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
GAP = "\0"
START, END = "<!-- messages -->\n", "<!-- end -->\n"
_HEADING = re.compile(r"^### `(.*)`$", re.MULTILINE)
_FAMILY = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.CATError)
}
#: Functions that take a message behind the place that it is about.
_PLACED = {"error", "_refuse", "_different"}
AREAS = {
    "cat_plugin/cli": "The command line",
    "cat_plugin/report": "Reports",
    "cat_plugin/recipe": "Recipes",
    "cat_plugin/hosts": "Neural Compressor",
    "cat_plugin/ptq": "The engine",
    "cat_plugin/cluster_affine": "The correction",
    "cat_plugin/graph/onnx": "ONNX",
    "cat_plugin/graph": "Bundles and exported graphs",
    "cat_plugin/serialization": "Saved models",
    "cat_plugin": "Models, data and options",
    "tvm_backend": "Compiling and running",
}


def _text(node: ast.expr) -> str | None:
    """A string with a mark in the place of what is filled in; None where it is made elsewhere."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [_text(side) for side in (node.left, node.right)]
        return None if parts == [None, None] else "".join(GAP if part is None else part for part in parts)
    return None


def _of_file(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        arguments = node.args[:1] if name in _FAMILY else node.args[1:2] if name in _PLACED else []
        for text in map(_text, arguments):
            if text is not None and text.replace(GAP, "").strip(" .,:;()"):
                yield text


def raised() -> dict[str, str]:
    """Every message of the code, with the area that raises it."""
    found: dict[str, str] = {}
    for package in ("cat_plugin", "tvm_backend"):
        for path in sorted((ROOT / package).rglob("*.py")):
            place = path.relative_to(ROOT).as_posix()
            area = next(name for folder, name in AREAS.items() if place.startswith(f"{folder}/"))
            for text in _of_file(path):
                found.setdefault(text, area)
    return found


def pattern(message: str) -> re.Pattern[str]:
    """A quoted message as it stands in the code: something is filled in wherever the page has three dots."""
    parts = (re.escape(part.strip()) for part in message.split("..."))
    return re.compile(rf"\s?{GAP}.{{0,60}}?".join(parts), re.DOTALL)


def explained(page: str) -> list[str]:
    """The messages that have a heading of their own."""
    return _HEADING.findall(page)


def listed(page: str) -> str:
    """The end of the page: by area, every message that has none."""
    known = [pattern(message) for message in explained(page)]
    rest: dict[str, list[str]] = {}
    for text, area in raised().items():
        if not any(each.search(text) for each in known):
            rest.setdefault(area, []).append(" ".join(text.replace(GAP, "...").replace("`", "'").split()))
    lines = []
    for area in AREAS.values():
        if area in rest:
            lines += [
                f"### {area}",
                "",
                *(f"- `{text}`" for text in sorted(set(rest[area]), key=str.lower)),
                "",
            ]
    return "\n".join(lines)


def with_list(page: str) -> str:
    """The page with its end written anew."""
    front, _, _ = page.partition(START)
    return f"{front}{START}\n{listed(front)}\n{END}"


if __name__ == "__main__":
    PAGE.write_text(with_list(PAGE.read_text("utf-8")), "utf-8")
