"""``cat-ptq recipe``: what it writes is a recipe, and it writes over nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cat_plugin import load_recipe
from cat_plugin.cli import main
from cat_plugin.cli.main import app

AsJson = Callable[..., dict[str, Any]]


def test_yes_takes_the_defaults(tmp_path: Path, as_json: AsJson) -> None:
    path = tmp_path / "new" / "recipe.yaml"
    assert as_json("recipe", "new", path, "--yes")["w_bits"] == [4, 2]
    recipe = load_recipe(path)
    (options,) = recipe.configurations
    assert (options["w_bits"], options["a_bits"], options["preset"]) == ([4, 2], 4, "balanced")
    assert recipe.criterion.try_all
    assert [entry.name for entry in path.parent.iterdir()] == ["recipe.yaml"]
    assert as_json("recipe", "check", path)["configurations"] == [
        "W4A4 balanced, K 64, alpha 0.4",
        "W2A4 balanced, K 64, alpha 0.4",
    ]


def test_every_option_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    assert main(["recipe", "new", str(path), "--yes", "--quiet"]) == 0
    lines = path.read_text().splitlines()
    options = [line for line in lines if ":" in line and not line.lstrip().startswith("#")]
    assert sum("#" in line for line in lines) >= len(options) - 4


def test_questions_are_asked(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    done = CliRunner().invoke(app, ["recipe", "new", str(path), "--preset", "fast"], input="3\n8,4\n0.02\n")
    assert done.exit_code == 0, done.output
    recipe = load_recipe(path)
    (options,) = recipe.configurations
    assert (options["w_bits"], options["a_bits"], options["preset"]) == (3, [8, 4], "fast")
    assert recipe.criterion.tolerance == 0.02


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("mine")
    assert main(["recipe", "new", str(path), "--yes"]) == 2
    assert "left as it is" in capsys.readouterr().err
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--w-bits", "1"], "2 to 8"),
        (["--w-bits", "four"], "2 to 8"),
        (["--a-bits", ""], "2 to 8"),
        (["--preset", "slow"], "fast, balanced or best"),
        (["--relative", "1.5"], "below 1"),
    ],
)
def test_bad_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["recipe", "new", str(tmp_path / "recipe.yaml"), "--yes", *words]) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_place_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["recipe", "new", str(tmp_path / "file" / "recipe.yaml"), "--yes"]) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["recipe", "check", "recipe.yaml"], ["recipe", "new", "other.yaml", "--yes"]]
)
def test_what_needs_no_torch_does_not_wait_for_it(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "recipe.yaml").write_text("quantization:\n  algorithm: cat\n  cat: {w_bits: 2, a_bits: 4}\n")
    code = (
        "import sys\nfrom cat_plugin.cli import main\n"
        f"assert main({words!r}) == 0\n"
        "assert not {'torch', 'sklearn', 'tvm', 'neural_compressor'} & set(sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
