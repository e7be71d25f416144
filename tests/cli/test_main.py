"""What all commands share: the global options, exit codes, errors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("neural_compressor", reason="Neural Compressor is not installed")

from cat_plugin.cli import main

AsJson = Callable[..., dict[str, Any]]


def test_quiet_prints_nothing(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "check", str(workspace / "recipe.yaml"), "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")


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


def test_every_command_is_a_function_in_a_file_of_its_name() -> None:
    from cat_plugin.cli.main import COMMANDS

    for words, command in COMMANDS:
        assert command.__module__ == f"cat_plugin.cli.{words.split()[0]}"
        assert command.__name__.rstrip("_") == words.split()[-1]


def test_every_command_is_in_the_guide() -> None:
    from cat_plugin.cli.main import COMMANDS

    guide = (Path(__file__).parents[2] / "docs" / "cli.md").read_text("utf-8")
    assert [words for words, _ in COMMANDS if f"`{words}`" not in guide] == []
