"""``cat-ptq sensitivity``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cat_plugin.cli import main
from tests.zoo.several import ImageAndText

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


def test_a_model_of_several_inputs_is_measured(tmp_path: Path, as_json: AsJson) -> None:
    arrays = {name: each.numpy() for name, each in ImageAndText.batch(24).items()}
    np.savez(tmp_path / "data.npz", **arrays)
    words = ["sensitivity", "--model", "tests.zoo.several:ImageAndText", "--data", str(tmp_path / "data.npz")]
    found = as_json(*words)["sensitivity"]
    assert len([each for each in found if each["kind"] != "block"]) > 2
    assert all(each["divergence"] > 0 for each in found)
    assert main([*words, "--mean", "0.5"]) == 2
