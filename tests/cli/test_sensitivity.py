"""``cat-ptq sensitivity``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cat_plugin.cli import main

AsJson = Callable[..., dict[str, Any]]


def _words(workspace: Path, *more: str) -> list[str]:
    network = ["--model", "examples.digits.model:build", "--weights", str(workspace / "digits.safetensors")]
    return ["sensitivity", *network, "--data", str(workspace / "calibration.npz"), *more]


def test_layers_and_blocks_are_listed(workspace: Path, as_json: AsJson) -> None:
    found = as_json(*_words(workspace, "--w-bits", "2"))["sensitivity"]
    layers = [each for each in found if each["kind"] != "block"]
    assert {each["w_bits"] for each in layers[1:-1]} == {2}
    assert (layers[0]["w_bits"], layers[-1]["w_bits"]) == (8, 8)
    assert len(found) > len(layers) > 3
    assert all(each["divergence"] >= 0 for each in found)
    everywhere = as_json(*_words(workspace, "--w-bits", "2", "--all"))["sensitivity"]
    assert everywhere[0]["w_bits"] == 2
    assert everywhere[0]["divergence"] > found[0]["divergence"]


def test_the_table_has_a_bar_for_the_worst(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_words(workspace)) == 0
    assert "\N{FULL BLOCK}" in capsys.readouterr().out


def test_data_that_are_not_there_are_refused(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sensitivity", "--model", "examples.digits.model:build", "--data", "nowhere.npz"]) == 2
    assert "no data at nowhere.npz" in capsys.readouterr().err
