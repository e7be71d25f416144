"""``cat-ptq compare``."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cat_plugin.cli import main

from .conftest import RECIPE, quantize_words

AsJson = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def coarse(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with fewer bits for activations."""
    root = tmp_path_factory.mktemp("coarse")
    (root / "coarse.yaml").write_text(RECIPE.replace("a_bits: 4", "a_bits: 2"))
    words = quantize_words(workspace, recipe=str(root / "coarse.yaml"), out=str(root / "bundle"))
    assert main([*words, "--no-measure"]) == 0
    return root


def test_two_bundles(
    workspace: Path, coarse: Path, as_json: AsJson, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "compare",
        str(workspace / "bundle"),
        str(coarse / "bundle"),
        "--data",
        str(workspace / "test.npz"),
    ]
    found = as_json(*words)
    rows = {row["what"]: row for row in found["rows"]}
    assert (rows["bits"]["first"], rows["bits"]["second"]) == ("W2A4", "W2A2")
    assert rows["weight bytes"]["difference"] == 0
    with np.load(workspace / "test.npz") as arrays:
        labels = arrays["labels"]
    differ = found["differ"]
    assert differ["differing"] == len(differ["rows"]) == sum(differ["right"].values()) > 0
    gained = differ["right"]["second"] - differ["right"]["first"]
    assert rows["top-1 percent"]["difference"] == pytest.approx(100 * gained / len(labels))
    for row in differ["rows"]:
        assert row["label"] == labels[row["sample"]]
        assert row["first"] != row["second"]
    assert main(words) == 0
    assert f"{differ['differing']} of {len(labels)} samples" in " ".join(capsys.readouterr().out.split())


def test_the_table_as_csv(workspace: Path, coarse: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", str(workspace / "bundle"), str(coarse / "bundle")]
    for given in (["--format", "csv", *words], [*words, "--format=csv"]):
        assert main(given) == 0
        lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
        assert lines[0] == {"what": "bits", "first": "W2A4", "second": "W2A2", "difference": ""}
        assert lines[1]["difference"] == "0"
    assert main([*words, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["first"] == "W2A4"
    assert main([*words, "--format", "yaml"]) == 2
    assert "yaml" in capsys.readouterr().err


def test_two_recipes_differ_by_their_options(workspace: Path, coarse: Path, as_json: AsJson) -> None:
    found = as_json("compare", workspace / "recipe.yaml", coarse / "coarse.yaml")
    assert [(row["what"], row["first"], row["second"]) for row in found["rows"]] == [("a_bits", "4", "2")]


def test_two_recipes_that_are_run(workspace: Path, coarse: Path, as_json: AsJson) -> None:
    """What is compared is what 'quantize' writes for each."""
    found = as_json(
        *("compare", workspace / "recipe.yaml", coarse / "coarse.yaml", "--data", workspace / "test.npz"),
        *("--model", "examples.digits.model:build", "--weights", workspace / "digits.safetensors"),
        *("--calibration", workspace / "calibration.npz"),
    )
    bundles = as_json("compare", workspace / "bundle", coarse / "bundle", "--data", workspace / "test.npz")
    scores = [
        next(row for row in each["rows"] if row["what"] == "top-1 percent") for each in (found, bundles)
    ]
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{bundle}", "{recipe}"], "give two bundles, or two recipes"),
        (["{recipe}", "{recipe}", "--data", "{test}"], "give --model and --calibration"),
        (["{recipe}", "{recipe}", "--model", "a:b"], "belong together"),
        (["{bundle}", "{bundle}", "--library", "{test}"], "--library is given 1 times"),
        (["{bundle}", "{bundle}", "--data", "no.npz"], "no data at no.npz"),
    ],
)
def test_what_cannot_be_compared(
    workspace: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    places = {
        "bundle": workspace / "bundle",
        "recipe": workspace / "recipe.yaml",
        "test": workspace / "test.npz",
    }
    assert main(["compare", *(word.format(**places) for word in words)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
