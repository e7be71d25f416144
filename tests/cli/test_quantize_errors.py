"""What ``cat-ptq quantize`` says and leaves when given something unusable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cat_plugin.cli import main

from .conftest import RECIPE, quantize_words

AsJson = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (RECIPE.replace("w_bits", "w_bit"), "w_bits"),
        (RECIPE.replace("algorithm: cat", "algorithm: dog"), "dog"),
        (RECIPE.replace("w_bits: 2", "w_bits: 9"), "9"),
        (RECIPE.replace("w_bits: 2", "w_bits: 1"), "1"),
        (RECIPE.replace("w_bits: 2", "w_bits: [4, 2]"), "--tune"),
        ("quantization: [", "recipe.yaml"),
        ("", "recipe.yaml"),
    ],
)
def test_bad_recipes(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str, message: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    out = tmp_path / "out"
    assert main(quantize_words(workspace, recipe=str(path), out=str(out))) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.yaml"]


def _with_nan(inputs: np.ndarray) -> np.ndarray:
    broken = inputs.copy()
    broken[70, 0, 3, 3] = np.nan
    return broken


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:0], "at least one"),
        (_with_nan, "batch"),
    ],
    ids=["empty", "nan"],
)
def test_bad_calibration(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, message: str
) -> None:
    with np.load(workspace / "calibration.npz") as arrays:
        np.savez(tmp_path / "x.npz", inputs=change(arrays["inputs"]))
    assert main(quantize_words(workspace, data=str(tmp_path / "x.npz"), out=str(tmp_path / "out"))) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.npz"]


@pytest.mark.parametrize(("end", "code"), [("nn.Flatten(0)", 2), ("nn.Identity()", 0)])
def test_model_whose_output_has_no_classes(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    end: str, code: int,
) -> None:  # fmt: skip
    """An output without an axis of classes is refused; a map of classes, (N, C, H, W), is quantized and corrected as a vector is."""
    (tmp_path / f"headless{code}.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        f"    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), {end})\n"
    )
    monkeypatch.chdir(tmp_path)
    words = quantize_words(workspace, model=f"headless{code}:build", out=str(tmp_path / "out"))
    del words[words.index("--weights") : words.index("--weights") + 2]
    assert main(words) == code
    if code:
        assert "expected" in capsys.readouterr().err
    assert (tmp_path / "out").exists() == (code == 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "no_such_module:build"}, "no_such_module"),
        ({"model": "examples.digits.model"}, "module:factory"),
        ({"model": "examples.digits.model:load_split"}, "expected a torch.nn.Module"),
        ({"weights": "missing.safetensors"}, "no weights at"),
        ({"weights": __file__}, "cannot be read as safetensors"),
        ({"data": "missing.npz"}, "no data at"),
        ({"recipe": "missing.yaml"}, "missing.yaml"),
    ],
)
def test_bad_arguments(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], message: str
) -> None:
    assert main(quantize_words(workspace, **{"out": str(tmp_path / "out"), **changes})) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not any(tmp_path.iterdir())
