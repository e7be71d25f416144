"""A run that is killed loses at most the unit at work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("preset", "kills"),
    [
        ("fast", 3),
        pytest.param("best", 12, marks=pytest.mark.slow),
        pytest.param("best", 20, marks=pytest.mark.long),
    ],
)
def test_a_run_killed_again_and_again_resumes_to_the_same_bits(tmp_path, preset, kills):
    command = [sys.executable, "-m", "tests.ptq.kill_and_resume", str(tmp_path), str(kills), preset]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout.splitlines()[-1])
    assert counted["kills"] == kills
    assert counted["stages_saved"] > 0
    assert counted["quantizations"] > 0
