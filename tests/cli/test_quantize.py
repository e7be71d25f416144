"""Long runs of ``cat-ptq quantize``: interrupted, resumed, watched."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cat_plugin.cli import main

from .conftest import RECIPE, quantize_words

AsJson = Callable[..., dict[str, Any]]
TRAINED = RECIPE.replace("preset: fast", "preset: balanced, unit_steps: 15, refinement_steps: 5")


def files_of(bundle: Path) -> dict[str, str]:
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


def logits_of(bundle: Path, data: Path) -> np.ndarray:
    from cat_plugin.graph.bundle import read_bundle
    from cat_plugin.report.outputs import both_logits

    with np.load(data) as arrays:
        return both_logits(read_bundle(bundle).program(), [arrays["inputs"]])[0]


def start(words: list[str]) -> subprocess.Popen[str]:
    """The command line in a process of its own; all have one thread, since sums in another order round otherwise."""
    return subprocess.Popen(
        [sys.executable, "-m", "cat_plugin.cli", *words],
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts jobs in the background with SIGINT ignored, and what they start inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "COLUMNS": "300",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        },
    )


def test_interrupted_and_resumed(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C in the middle leaves no bundle; with --resume the result is that of a run left alone."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(TRAINED)
    kept, out = tmp_path / "bundle.state", tmp_path / "bundle"
    words = quantize_words(workspace, recipe=str(recipe), out=str(out))
    alone = tmp_path / "alone"
    process = start(words)
    deadline = time.monotonic() + 300
    while not list(kept.glob("*/state.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130, error
    assert "interrupted; nothing was left half-written" in error
    assert "--resume" in error
    assert "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle.state", "recipe.yaml"]

    for again in ([*words, "--resume"], quantize_words(workspace, recipe=str(recipe), out=str(alone))):
        process = start(again)
        _, error = process.communicate(timeout=600)
        assert process.returncode == 0, error
        assert not kept.exists()
    assert files_of(out) == files_of(alone)
    data = workspace / "test.npz"
    np.testing.assert_array_equal(logits_of(out, data), logits_of(alone, data))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "bundle", "recipe.yaml"]


def test_a_tuning_run_goes_on_behind_its_last_trial(
    workspace: Path, tmp_path: Path, as_json: AsJson, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Interrupted in the second trial: the first is neither quantized nor scored again, and the bundle is the same."""
    from cat_plugin.report import scoring

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("w_bits: 2", "w_bits: [4, 2]") + "tuning: {try_all: true}\n")
    kept = tmp_path / "tuned.state"

    def words(name: str) -> list[str]:
        changes = {"recipe": str(recipe), "tune": str(workspace / "tune.npz"), "out": str(tmp_path / name)}
        return [*quantize_words(workspace, **changes), "--no-measure"]

    scored: list[str] = []
    stops = [3]
    plain = scoring.logits_of

    def counted(model: Any, *args: Any) -> Any:
        scored.append(type(model).__name__)
        if len(scored) in stops:  # the baseline, the first trial, the second
            raise KeyboardInterrupt
        return plain(model, *args)

    monkeypatch.setattr(scoring, "logits_of", counted)
    assert main(words("tuned")) == 130
    assert "--resume" in capsys.readouterr().err
    assert not (tmp_path / "tuned").exists()
    first, second = as_json("inspect", kept)["quantizations"]
    assert [first["configuration"], second["configuration"]] == ["W4A4 fast", "W2A4 fast"]
    assert first["complete"]
    assert second["complete"]
    assert len(list(kept.glob("logits_*.npy"))) == 1
    assert main(["inspect", str(kept)]) == 0
    assert "W2A4 fast" in capsys.readouterr().out

    scored.clear()
    stops.clear()
    assert main([*words("tuned"), "--resume"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "2 quantizations: 2 complete" in told
    assert "holds this quantization complete" in told
    assert len(scored) == 2  # the first trial's score was there
    assert not kept.exists()
    scored.clear()
    assert main([*words("alone"), "--resume"]) == 0
    assert "there is nothing to go on from" in " ".join(capsys.readouterr().err.split())
    assert files_of(tmp_path / "tuned") == files_of(tmp_path / "alone")


def test_state_of_another_run_is_not_taken_for_this_one(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "bundle.state"
    (kept / ("0" * 16)).mkdir(parents=True)
    (kept / ("0" * 16) / "state.json").write_text('{"fingerprint": "another"}')
    assert main([*quantize_words(workspace, out=str(tmp_path / "bundle")), "--no-measure"]) == 0
    assert "earlier run's state" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_destination_is_checked_before_the_work(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cat_plugin.recipe.recipe import Recipe

    monkeypatch.setattr(Recipe, "run", lambda *_, **__: pytest.fail("it ran"))
    (tmp_path / "notes.txt").write_text("mine")
    assert main(quantize_words(workspace, out=str(tmp_path))) == 2
    assert "not a bundle" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert main(quantize_words(workspace, out=str(tmp_path / "notes.txt" / "bundle"))) == 2
    assert "cannot write the state of the run" in capsys.readouterr().err


def test_progress_is_drawn_with_losses(
    workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(TRAINED)
    words = [*quantize_words(workspace, recipe=str(recipe), out=str(tmp_path / "b")), "--no-measure"]
    assert main(words) == 0
    drawn = capfd.readouterr().err
    assert "W2A4 balanced" in drawn
    assert "\N{RIGHTWARDS ARROW}" in drawn
    assert "100%" in drawn
    assert main([*words, "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")


def test_tensorboard(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*quantize_words(workspace, out=str(tmp_path / "b")), "--tensorboard", str(tmp_path / "events")]
    if importlib.util.find_spec("tensorboard") is None:
        assert main(words) == 2
        assert "pip install tensorboard" in capsys.readouterr().err
        assert not any(tmp_path.iterdir())
    else:
        assert main(words) == 0
        assert list((tmp_path / "events").glob("events.*"))


def test_tensorboard_gets_losses_and_scores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is written, with a writer that only listens."""
    from types import ModuleType, SimpleNamespace

    from cat_plugin.cli import tensorboard
    from cat_plugin.ptq.progress import Progress
    from cat_plugin.recipe.criteria import Trial

    written: list[tuple[str, float, int]] = []
    fake = ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = lambda directory: SimpleNamespace(  # type: ignore[attr-defined]
        add_scalar=lambda *values: written.append(values), close=lambda: written.append(("closed", 0.0, 0))
    )
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setattr(tensorboard.importlib.util, "find_spec", lambda name: object())
    scalars = tensorboard.Scalars(tmp_path)
    scalars.unit("trial 1", Progress("a", 0.1))
    scalars.unit("trial 1", Progress("a", 0.2, 3.0, 2.0))
    scalars.unit("trial 1", Progress("b", 0.4, 5.0, 4.0))
    scalars.trials(0.9, [Trial({}, 0.8, 1.5, False)])
    scalars.close()
    assert written == [
        ("trial 1/loss before", 3.0, 1), ("trial 1/loss after", 2.0, 1),
        ("trial 1/loss before", 5.0, 2), ("trial 1/loss after", 4.0, 2),
        ("tuning/score", 0.9, 0), ("tuning/score", 0.8, 1), ("tuning/seconds", 1.5, 1), ("closed", 0.0, 0),
    ]  # fmt: skip


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


def test_a_criterion_that_no_trial_meets_is_an_exit_code(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best bundle is written all the same; --allow-miss is content with it."""
    (tmp_path / "strict.py").write_text(
        "count = 0\ndef falling(logits, labels):\n    global count\n    count += 1\n    return 1 / count\n"
    )
    monkeypatch.chdir(tmp_path)
    changes = {"tune": str(workspace / "tune.npz"), "metric": "strict:falling"}
    words = [*quantize_words(workspace, out=str(tmp_path / "b"), **changes), "--no-measure"]
    assert main(words) == 3
    assert "no trial met the criterion" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "b" / "manifest.json").is_file()
    assert not (tmp_path / "b.state").exists()
    assert main([*words, "--allow-miss"]) == 0
    capsys.readouterr()
    main([*words, "--json"])
    (trial,) = json.loads(capsys.readouterr().out)["trials"]
    assert not trial["met"]
    assert trial["score"] < trial["uncorrected"]
