"""What all commands share: the global options, exit codes, errors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cat_plugin.cli import main

AsJson = Callable[..., dict[str, Any]]


def test_quiet_prints_nothing(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "check", str(workspace / "recipe.yaml"), "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")


def test_threads_that_wait_sleep(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless somebody says otherwise."""
    for said, found in ((None, "passive"), ("active", "active")):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        if said is not None:
            monkeypatch.setenv("OMP_WAIT_POLICY", said)
        assert main(["recipe", "check", str(workspace / "recipe.yaml"), "--quiet"]) == 0
        assert os.environ["OMP_WAIT_POLICY"] == found


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


@pytest.mark.parametrize("words", [[], ["recipe"], ["--json"]])
def test_no_command_is_a_question(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert "Usage" in capsys.readouterr().out


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["tvm"] = None
from cat_plugin.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quantize", "no.yaml", "--model", "a:b", "--data", "x", "--out", "o"], "no recipe at no.yaml"),
        (["quantize", __file__, "--model", "a:b", "--data", "no.npz", "--out", "o"], "no data at no.npz"),
        (["recipe", "check", "no.yaml"], "no recipe at no.yaml"),
        (["evaluate", "no", "--data", "no.npz"], "no data at no.npz"),
        (["evaluate", "no", "--data", __file__], "no is not a bundle"),
        (["run", "no.so", "--input", "no.npz"], "no compiled library at no.so"),
        (["benchmark", "no.so"], "no compiled library at no.so"),
        (["report", "no", "--library", "no.so"], "no compiled library at no.so"),
        (["compile", "no"], "no is not a bundle"),
        (["inspect", "no"], "no is not a bundle"),
    ],
)
def test_a_wrong_name_is_found_out_before_anything_is_imported(
    words: list[str], message: str, tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert not any(tmp_path.iterdir())


def test_every_command_is_a_function_in_a_file_of_its_name() -> None:
    from cat_plugin.cli.main import COMMANDS

    for words, command in COMMANDS:
        assert command.__module__ == f"cat_plugin.cli.{words.split()[0]}"
        assert command.__name__.rstrip("_") == words.split()[-1]


def test_every_command_is_in_the_guide() -> None:
    from cat_plugin.cli.main import COMMANDS

    guide = (Path(__file__).parents[2] / "docs" / "cli.md").read_text("utf-8")
    assert [words for words, _ in COMMANDS if f"`{words}`" not in guide] == []
