"""Nothing of the user's is ever deleted or overwritten, whatever command is given whatever place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cat_plugin.cli import main
from cat_plugin.cli.main import COMMANDS
from cat_plugin.cli.places import held_state
from cat_plugin.errors import BundleError

from .conftest import quantize_words

READING = {"recipe check", "evaluate", "benchmark", "compare", "inspect", "doctor", "sensitivity"}


def _words(command: str, workspace: Path, root: Path) -> list[str]:
    """The command, writing below `root` whatever it can write."""
    bundle = str(workspace / "bundle")
    library = str(workspace / "library" / "digits.so")
    return {
        "recipe new": ["recipe", "new", str(root / "recipe.yaml"), "--yes"],
        "quantize": [
            *quantize_words(workspace, out=str(root / "bundle"), tensorboard=str(root / "events")),
            "--no-measure",
        ],
        "run": ["run", library, "--input", str(workspace / "test.npz"), "--out", str(root / "logits.npz")],
        "report": ["report", bundle, "--out", str(root / "report.html")],
        "compile": ["compile", bundle, "--out", str(root / "model.so"), "--target", "portable"],
        "export": ["export", bundle, "--out", str(root / "net.onnx")],
        "correct": [
            *("correct", "--reference", "full.onnx", "--quantized", "int8.onnx"),
            *("--data", str(workspace / "test.npz"), "--out", str(root / "net.onnx")),
        ],
    }[command]


def _text(*names: str) -> Callable[[Path, Path], None]:
    def make(root: Path, workspace: Path) -> None:
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("mine")

    return make


def _bundle_with_notes(root: Path, workspace: Path) -> None:
    (root / "bundle").mkdir()
    for path in (workspace / "bundle").iterdir():
        (root / "bundle" / path.name).write_bytes(path.read_bytes())
    (root / "bundle" / "notes.txt").write_text("mine")


def _state_with_notes(root: Path, workspace: Path) -> None:
    kept = root / "bundle.state" / ("0" * 16)
    kept.mkdir(parents=True)
    (kept / "state.json").write_text('{"fingerprint": "x"}')
    (kept / "thesis.tex").write_text("mine")


def _json(name: str, value: object) -> Callable[[Path, Path], None]:
    def make(root: Path, workspace: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(value))

    return make


def _own_arrays(root: Path, workspace: Path) -> None:
    np.savez(root / "logits.npz", logits=np.zeros((2, 3)))


def _link(name: str) -> Callable[[Path, Path], None]:
    def make(root: Path, workspace: Path) -> None:
        (root / "mine").mkdir()
        (root / "mine" / "file").write_text("mine")
        (root / name).symlink_to(root / "mine")

    return make


FOREIGN = {
    "recipe new": [_text("recipe.yaml"), _text("recipe.yaml/inside"), _link("recipe.yaml")],
    "quantize": [
        _text("bundle"),
        _text("bundle/thesis.tex"),
        _text("bundle/manifest.json"),
        _json("bundle/manifest.json", {"format": "a web application"}),
        _bundle_with_notes,
        _link("bundle"),
        _text("bundle.state"),
        _text("bundle.state/thesis.tex"),
        _text("bundle.state/deep/er/state.json"),
        _json(f"bundle.state/{'0' * 16}/state.json", {"of": "something else"}),
        _state_with_notes,
        _link("bundle.state"),
        _text("events"),
    ],
    "run": [_text("logits.npz"), _own_arrays, _text("logits.npz/inside"), _link("logits.npz")],
    "report": [_text("report.html"), _text("report.html/inside"), _link("report.html")],
    "compile": [
        _text("model.so"),
        _text("model.json"),
        _json("model.json", {"format": "weights", "variants": [{"file": "model.so"}]}),
        _json("model.json", []),
        _text("model.so/inside"),
        _text("model.json/inside"),
        _text("model.baseline.so"),
        _link("model.so"),
    ],
    "export": [_text("net.onnx"), _text("net.onnx/inside"), _link("net.onnx")],
    "correct": [_text("net.onnx"), _text("net.onnx/inside"), _link("net.onnx")],
}
CASES = [
    pytest.param(command, make, id=f"{command}-{number}")
    for command, makers in FOREIGN.items()
    for number, make in enumerate(makers)
]


def _everything(root: Path) -> dict[str, object]:
    return {
        str(path.relative_to(root)): path.readlink()
        if path.is_symlink()
        else path.is_file() and path.read_bytes()
        for path in sorted(root.rglob("*"))
    }


def test_every_command_is_walked() -> None:
    assert READING | set(FOREIGN) == {words for words, _ in COMMANDS}


@pytest.mark.parametrize(("command", "make"), CASES)
def test_what_is_not_ours_is_left_as_it_is(
    workspace: Path,
    library: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    make: Callable[[Path, Path], None],
) -> None:
    make(tmp_path, workspace)
    before = _everything(tmp_path)
    assert main(_words(command, workspace, tmp_path)) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert _everything(tmp_path) == before
    assert "left as it is" in error or "is a directory" in error


@pytest.mark.parametrize("command", sorted(set(FOREIGN) - {"recipe new", "quantize", "correct"}))
def test_what_is_ours_is_replaced_and_its_neighbours_are_not(
    workspace: Path, library: Path, tmp_path: Path, command: str
) -> None:
    names = (".logits.npz.part.npz", "logits.npz.bak", "model.c", "model.txt", "report.htm", "report.html~")
    for name in names:
        (tmp_path / name).write_text("mine")
    words = [word if word != "portable" else "native" for word in _words(command, workspace, tmp_path)]
    assert main([*words, "--quiet"]) == 0
    first = set(_everything(tmp_path))
    assert main([*words, "--quiet"]) == 0
    assert set(_everything(tmp_path)) == first
    assert all((tmp_path / name).read_text() == "mine" for name in names)


def _saved(kept: Path) -> None:
    (kept / ("0" * 16)).mkdir(parents=True, exist_ok=True)
    (kept / ("0" * 16) / "state.json").write_text('{"fingerprint": "x"}')


def _unused(kept: Path) -> None:
    pytest.fail(f"{kept} was dropped")


def test_a_state_that_another_run_is_working_in_is_left_alone(tmp_path: Path) -> None:
    kept = tmp_path / "bundle.state"
    with held_state(kept, False, _unused):
        _saved(kept)
        with pytest.raises(BundleError, match="another run is at work"), held_state(kept, False, _unused):
            pytest.fail("two runs had one state")
        assert (kept / ("0" * 16) / "state.json").exists()
    assert not kept.exists()


def test_what_came_into_a_state_meanwhile_stays(tmp_path: Path) -> None:
    kept = tmp_path / "bundle.state"
    with held_state(kept, False, _unused):
        _saved(kept)
        (kept / "thesis.tex").write_text("mine")
    assert [path.name for path in kept.iterdir()] == ["thesis.tex"]


def test_a_state_is_free_again_when_its_run_has_ended(tmp_path: Path) -> None:
    kept = tmp_path / "bundle.state"
    run = held_state(kept, False, _unused)
    run.__enter__()
    _saved(kept)
    assert not run.__exit__(RuntimeError, RuntimeError(), None)
    assert kept.is_dir()  # there is something to go on from
    dropped: list[Path] = []
    with held_state(kept, True, dropped.append):
        assert (kept / ("0" * 16) / "state.json").exists()
        assert dropped == []
    assert not kept.exists()


def test_a_state_whose_run_was_interrupted_while_it_wrote_tensors_is_a_state(tmp_path: Path) -> None:
    kept = tmp_path / "bundle.state"
    _saved(kept)
    staging = kept / ("0" * 16) / ".tensors.cat-part"
    staging.mkdir()
    (staging / ".tmpA1b2C3").write_bytes(b"")
    with held_state(kept, True, _unused):
        assert staging.exists()
    assert not kept.exists()
    _saved(kept)
    staging.mkdir()
    (staging / "folder").mkdir()
    with pytest.raises(BundleError, match="not of a run's state"), held_state(kept, True, _unused):
        pytest.fail("a folder was taken for what a run writes")
