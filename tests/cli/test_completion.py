"""Completion in a real bash."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BASH = shutil.which("bash")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A PATH with ``cat-ptq`` on it, as an installation makes it."""
    script = tmp_path / "bin" / "cat-ptq"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\nimport sys\nfrom cat_plugin.cli import main\nsys.exit(main())\n")
    script.chmod(0o755)
    path = os.pathsep.join([str(script.parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.skipif(BASH is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("cat-ptq ben", {"benchmark"}),
        ("cat-ptq recipe ", {"new", "check"}),
        ("cat-ptq quantize --res", {"--resume"}),
        ("cat-ptq compile bundle --target por", {"portable"}),
        ("cat-ptq recipe new --preset b", {"balanced", "best"}),
    ],
)
def test_bash(environment: dict[str, str], tmp_path: Path, line: str, expected: set[str]) -> None:
    assert BASH is not None
    program = (
        'source <(_CAT_PTQ_COMPLETE=source_bash cat-ptq); read -ra COMP_WORDS <<< "$1"; [[ "$1" == *" " ]] && COMP_WORDS+=("");'
        "COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _cat_ptq_completion cat-ptq;"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        [BASH, "-c", program, "bash", line],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert set(done.stdout.split()) == expected, done.stderr
