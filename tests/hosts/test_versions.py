"""The list of supported releases is what tox installs, what the docs show, and what is true here."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from cat_plugin.hosts.versions import RELEASES, markdown_table, tox_environment

from .conftest import INC

ROOT = Path(__file__).parents[2]


def text_of(name: str, mark: str) -> str:
    path = ROOT / name
    if not path.exists() or mark not in path.read_text("utf-8"):
        pytest.skip(f"{name} does not list the releases here")
    return path.read_text("utf-8")


def test_tox_installs_them():
    text = text_of("tox.ini", "[testenv:inc")
    lines = {line.strip() for line in text.splitlines()}
    for release in RELEASES:
        assert f"{release.environment}: {release.requirement}" in lines
    old = ",".join(release.environment.removeprefix("inc") for release in RELEASES if release.pins)
    for pin in {pin for release in RELEASES for pin in release.pins}:
        assert f"inc{{{old}}}: {pin}" in lines


def test_docs_show_them():
    assert markdown_table() in text_of("docs/hosts.md", "| Neural Compressor | YAML recipe |")


def test_environment_of_a_release():
    assert tox_environment(RELEASES[0]).splitlines() == [
        "inc24: neural-compressor==2.4",
        "inc24: setuptools<81",
        "inc24: six",
    ]


@pytest.mark.skipif(INC == (0, 0), reason="no Neural Compressor is installed")
def test_what_is_said_of_the_installed_release_is_true():
    release = next(each for each in RELEASES if each.version == f"{INC[0]}.{INC[1]}")

    def has(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:
            return False

    assert release.yaml == has("neural_compressor.experimental.quantization")
    assert release.python2 == has("neural_compressor.quantization")
    assert release.torch3 == has("neural_compressor.torch.quantization")
