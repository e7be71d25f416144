"""Every code block of the README and the docs runs as written."""

from __future__ import annotations

import configparser
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cat_plugin.hosts import register

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_CODE = {"", "text", "math", "mermaid"}
FENCE = re.compile(r"^```(?P<language>[\w+-]*)[^\n]*\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    language: str
    body: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(match["language"], match["body"], text.count("\n", 0, match.start()) + 1)
        for match in FENCE.finditer(text)
    ]


def run_python(block: Block, page: Path, namespace: dict[str, object]) -> None:
    source = "\n" * block.line + block.body  # keeps the page's line numbers in tracebacks
    exec(compile(source, str(page), "exec"), namespace)


def write_file(block: Block) -> None:
    """A YAML block names its file in its first line: ``# recipe.yaml``."""
    name = re.match(r"#\s*([\w.-]+\.ya?ml)\s*$", block.body.split("\n", 1)[0])
    assert name, f"line {block.line}: the first line of a YAML block is a comment with its file name"
    Path(name[1]).write_text(block.body)


def check_example(module: str, arguments: list[str]) -> None:
    """An example takes minutes and data: that it runs is tested elsewhere, here that it has these options."""
    source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text("utf-8")
    for option in (word for word in arguments if word.startswith("--")):
        assert f'"{option}"' in source, f"{module} has no option {option}"


def run_commands(block: Block) -> None:
    from cat_plugin.cli import main

    for line in block.body.replace("\\\n", " ").splitlines():
        assert line.startswith("$ "), f"line {block.line}: {line!r} does not start with '$ '"
        for command in line[2:].split(" && "):
            words = shlex.split(command)
            if words[0] == "cat-ptq":
                assert main(words[1:]) == 0, command
            elif words[:2] == ["tox", "run"]:
                config = configparser.ConfigParser()
                config.read(ROOT / "tox.ini")
                assert f"testenv:{words[words.index('-e') + 1]}" in config, command
            elif words[:2] == ["python", "-m"] and words[2].startswith("examples."):
                check_example(words[2], words[3:])
            else:
                assert words[:4] == ["python", "-m", "pip", "install"], (
                    f"line {block.line}: cannot check {command!r}"
                )


@pytest.fixture(autouse=True)
def _registered_again() -> Iterator[None]:
    """A page may show how to unregister; other tests want the algorithm back."""
    yield
    register()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.language == "python":
            run_python(block, page, namespace)
        elif block.language == "yaml":
            write_file(block)
        elif block.language == "console":
            run_commands(block)
        else:
            assert block.language in NOT_CODE, f"line {block.line}: nothing here runs {block.language!r}"


def test_there_is_something_to_run() -> None:
    languages = {block.language for block in blocks_of(ROOT / "README.md")}
    assert {"python", "yaml", "console"} <= languages
    assert sys.version_info >= (3, 11)
