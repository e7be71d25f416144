"""What images are prepared with is said once, when quantizing, and travels with the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cat_plugin.cli import main
from cat_plugin.cli.options import class_names, preparation
from cat_plugin.errors import CATValueError
from cat_plugin.graph.preparation import Preparation

from .conftest import quantize_words

AsJson = Callable[..., dict[str, Any]]
MEAN, STD = str(4.884 / 16), str(6.017 / 16)
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def pictures(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same digits as stored images, and a bundle calibrated on them."""
    root = tmp_path_factory.mktemp("pictures")
    for name in ("calibration", "test"):
        with np.load(workspace / f"{name}.npz") as arrays:
            pixels = np.rint((arrays["inputs"] * 6.017 + 4.884) * 255 / 16).astype(np.uint8)
            rest = {"labels": arrays["labels"]} if "labels" in arrays.files else {}
            np.savez(root / f"{name}.npz", images=pixels.transpose(0, 2, 3, 1), **rest)
    (root / "names.txt").write_text("\n".join(NAMES) + "\n")
    words = quantize_words(
        workspace,
        data=str(root / "calibration.npz"),
        out=str(root / "bundle"),
        mean=MEAN,
        std=STD,
        classes=str(root / "names.txt"),
    )
    assert main([*words, "--no-measure"]) == 0
    return root


def test_it_is_stored_and_used_again(pictures: Path, as_json: AsJson) -> None:
    manifest = json.loads((pictures / "bundle" / "manifest.json").read_text())
    assert manifest["preparation"] == Preparation(mean=(4.884 / 16,), std=(6.017 / 16,)).to_dict()
    assert manifest["class_names"] == NAMES
    words = ["evaluate", pictures / "bundle", "--data", pictures / "test.npz"]
    found = as_json(*words)
    assert found["top1_percent"] > 90
    assert as_json(*words, "--mean", MEAN) == found
    wrong = as_json(*words, "--mean", "0", "--std", "20", "--force")
    assert wrong["top1_percent"] < found["top1_percent"]


def test_other_values_are_refused(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(pictures / "bundle"), "--data", str(pictures / "test.npz")]
    assert main([*words, "--std", "20"]) == 2
    assert "--std is not what the model was calibrated with" in capsys.readouterr().err


def test_arrays_are_not_prepared_as_images(
    pictures: Path, workspace: Path, as_json: AsJson, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers that were normalised already would be normalised again, and score like chance in silence."""
    words = ["evaluate", str(pictures / "bundle"), "--data", str(workspace / "test.npz")]
    assert main(words) == 2
    assert "holds arrays and the model was calibrated on images" in capsys.readouterr().err
    assert as_json(*words, "--force")["top1_percent"] > 90


def test_the_library_knows_it_too(
    pictures: Path, as_json: AsJson, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tvm", reason="TVM is not installed")
    import tvm_backend

    library = pictures / "digits.so"
    as_json("compile", pictures / "bundle", "--out", library)
    ran = as_json("run", library, "--input", pictures / "test.npz")
    assert ran["top1_percent"] > 90
    assert ran["class_names"] == [NAMES[index] for index in ran["predictions"]]
    assert main(["run", str(library), "--input", str(pictures / "test.npz"), "--mean", "0"]) == 2
    assert "--mean is not what the model was calibrated with" in capsys.readouterr().err
    with np.load(pictures / "test.npz") as arrays:
        top = tvm_backend.load(library).predict(arrays["images"][:20], top=2)
    assert top.classes[:, 0].tolist() == ran["predictions"][:20]
    shown = as_json("inspect", library)
    assert shown["class_names"] == NAMES


def test_images_for_a_library_that_says_nothing_are_warned_of(
    pictures: Path, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads(library.with_suffix(".json").read_text())
    (tmp_path / library.name).write_bytes(library.read_bytes())
    (tmp_path / library.name).with_suffix(".json").write_text(json.dumps(manifest | {"preparation": None}))
    assert main(["run", str(tmp_path / library.name), "--input", str(pictures / "test.npz")]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "does not say how images are prepared for it" in told


def test_names_that_do_not_fit_are_refused_before_the_work(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    words = quantize_words(workspace, out=str(tmp_path / "bundle"), classes=str(tmp_path / "names.txt"))
    assert main(words) == 2
    assert "--classes names 2 classes and the model has 10" in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(CATValueError, match="is empty; give a text file"):
        class_names(tmp_path / "empty.txt")
    with pytest.raises(CATValueError, match="cannot be read"):
        class_names(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("0.5", "0,0,0"), "numbers above 0"),
        (("0.5", "0.1,0.2,0.3"), "mean has 1 values and std 3"),
        (("a", None), "not a comma-separated list of numbers"),
    ],
)
def test_options_that_cannot_be(options: tuple[str, str | None], message: str) -> None:
    with pytest.raises(CATValueError, match=message):
        preparation(*options, None, None)
