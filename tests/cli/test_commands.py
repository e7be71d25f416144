"""The commands, from recipe to logits; and what each says and leaves when given something unusable."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("neural_compressor", reason="Neural Compressor is not installed")

from cat_plugin.cli import main

from .conftest import RECIPE, quantize_words

AsJson = Callable[..., dict[str, Any]]


def test_evaluate_measures_the_corrected_model(workspace: Path, as_json: AsJson) -> None:
    found = as_json("evaluate", str(workspace / "bundle"), "--data", str(workspace / "test.npz"))
    assert found["samples"] == 600
    assert found["top1_percent"] > 90


def test_inspect_lists_layers(workspace: Path, capsys: pytest.CaptureFixture[str], as_json: AsJson) -> None:
    found = as_json("inspect", str(workspace / "bundle"))
    assert {layer["w_bits"] for layer in found["layers"]} == {2, 8}
    assert main(["inspect", str(workspace / "bundle")]) == 0
    assert "stem.0" in capsys.readouterr().out


def test_compile_and_run_agree_with_pytorch(
    workspace: Path, library: Path, tmp_path: Path, as_json: AsJson
) -> None:
    bundle, data = workspace / "bundle", workspace / "test.npz"
    ran = as_json("run", library, "--input", data, "--out", tmp_path / "logits")
    evaluated = as_json("evaluate", bundle, "--data", data)
    assert ran["top1_percent"] == pytest.approx(evaluated["top1_percent"], abs=0.2)
    with np.load(tmp_path / "logits.npz") as arrays:
        assert arrays["logits"].argmax(1).tolist() == ran["predictions"]
    assert [path.name for path in tmp_path.iterdir()] == ["logits.npz"]


def test_compile_says_what_it_did(workspace: Path, library: Path, tmp_path: Path, as_json: AsJson) -> None:
    again = as_json("compile", workspace / "bundle", "--out", tmp_path / "x.so", "--batch-sizes", "1")
    assert again["cached"]
    assert again["bytes"] == library.stat().st_size
    assert again["float_ops"] == []
    assert again["batch_sizes"] == [1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "{kind: cuda}"], "not valid JSON"),
        (["--target", "no-such-processor"], "no-such-processor"),
        (["--batch-sizes", "1,x"], "--batch-sizes"),
        (["--out", "model.dll"], "must end in .so"),
    ],
)
def test_bad_compile_options(
    workspace: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    pytest.importorskip("tvm", reason="TVM is not installed")
    assert main(["compile", str(workspace / "bundle"), *words]) == 2
    assert message in capsys.readouterr().err


def test_inspect_describes_a_library(
    library: Path, as_json: AsJson, capsys: pytest.CaptureFixture[str]
) -> None:
    found = as_json("inspect", library)
    assert found["batch_sizes"] == [1]
    assert any(kernel["weight_bits"] == 2 for kernel in found["kernels"])
    assert main(["inspect", str(library)]) == 0
    assert "2 bit" in capsys.readouterr().out


def test_evaluate_prepares_images_as_the_calibration_was(
    workspace: Path, tmp_path: Path, as_json: AsJson
) -> None:
    """The same digits as stored images: mean and deviation are given once, when quantizing."""
    for name in ("calibration", "test"):
        with np.load(workspace / f"{name}.npz") as arrays:
            pixels = np.rint((arrays["inputs"] * 6.017 + 4.884) * 255 / 16).astype(np.uint8)
            rest = {"labels": arrays["labels"]} if "labels" in arrays.files else {}
            np.savez(tmp_path / f"{name}.npz", images=pixels.transpose(0, 2, 3, 1), **rest)
    changes = {"data": str(tmp_path / "calibration.npz"), "out": str(tmp_path / "bundle")}
    scale = {"mean": str(4.884 / 16), "std": str(6.017 / 16)}
    assert main([*quantize_words(workspace, **changes, **scale), "--no-measure"]) == 0
    found = as_json("evaluate", tmp_path / "bundle", "--data", tmp_path / "test.npz")
    assert found["top1_percent"] > 90
    wrong = as_json(
        "evaluate", tmp_path / "bundle", "--data", tmp_path / "test.npz", "--mean", "0", "--std", "20"
    )
    assert wrong["top1_percent"] < found["top1_percent"]


def test_tuning_uses_the_labelled_data(workspace: Path, tmp_path: Path, as_json: AsJson) -> None:
    words = quantize_words(workspace, tune=str(workspace / "tune.npz"), out=str(tmp_path / "tuned"))
    found = as_json(*words)
    (trial,) = found["trials"]
    assert trial["best"]
    assert trial["weight_bytes"] == found["weight_bytes"] < found["float_weight_bytes"] / 12
    assert 0.9 < trial["score"] <= 1
    record = json.loads((tmp_path / "tuned" / "report.json").read_text())
    assert {"recipe", "config", "engine", "tuning", "labels", "sensitivity", "clusters"} <= record.keys()
    assert record["labels"]["correct"]["corrected"] == round(200 * trial["score"])
    assert record["labels"]["correct"]["quantized"] == round(200 * trial["uncorrected"])
    assert [layer["name"] for layer in record["sensitivity"]["layers"]] == [
        layer["name"] for layer in record["engine"]["layers"]
    ]
    assert sum(mean["rows"] for mean in record["clusters"]["means"]) == 347
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tuned"]


def test_quiet_prints_nothing(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "check", str(workspace / "recipe.yaml"), "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")


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


def test_model_whose_output_is_no_matrix(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "headless.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    words = quantize_words(workspace, model="headless:build", out=str(tmp_path / "out"))
    del words[words.index("--weights") : words.index("--weights") + 2]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "(N, C)" in error
    assert not (tmp_path / "out").exists()


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


def test_damaged_bundle(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (workspace / "bundle").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = bytearray((tmp_path / "model.pt2").read_bytes())
    content[1000] ^= 1
    (tmp_path / "model.pt2").write_bytes(content)
    for words in (
        ["evaluate", str(tmp_path), "--data", str(workspace / "test.npz")],
        ["compile", str(tmp_path), "--out", str(tmp_path / "model.so")],
        ["inspect", str(tmp_path)],
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert "sha256" in error
        assert "Traceback" not in error
    assert not (tmp_path / "model.so").exists()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "cat_plugin.cli", "inspect", str(tmp_path)]
    plain = subprocess.run(words, capture_output=True, text=True, check=False)
    assert plain.returncode == 2
    assert "Traceback" not in plain.stderr
    debug = subprocess.run([*words, "--debug"], capture_output=True, text=True, check=False)
    assert "Traceback" in debug.stderr


def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize"]) == 2
    assert main(["no-such-command"]) == 2
    assert main(["--version"]) == 0
    assert "cat-ptq" in capsys.readouterr().out


def test_doctor_names_what_is_there(as_json: AsJson) -> None:
    found = as_json("doctor")
    parts = {part["part"]: part for part in found["parts"]}
    assert parts["torch"]["found"].startswith("2.")
    assert parts["neural-compressor"]["found"][0].isdigit()
    assert parts["recipe host"]["state"] == "ok"
    assert all(part["hint"] for part in found["parts"] if part["state"] != "ok")
    assert found["ok"] == all(part["state"] != "missing" for part in found["parts"])


def test_doctor_says_what_to_install(
    capsys: pytest.CaptureFixture[str], as_json: AsJson, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cat_plugin.cli import doctor

    def absent(name: str) -> str:
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", absent)
    found = as_json("doctor")
    assert not found["ok"]
    hints = {part["part"]: part["hint"] for part in found["parts"]}
    assert "cat-ptq[inc]" in hints["neural-compressor"]
    assert "cat-ptq[inc]" in hints["recipe host"]
    assert main(["doctor"]) == 0
    assert "cat-ptq[inc]" in capsys.readouterr().out.replace("\n", "")
