"""A run that is killed loses at most the unit at work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_run_killed_twenty_times_resumes_to_the_same_bits(tmp_path):
    command = [sys.executable, "-m", "tests.ptq.kill_and_resume", str(tmp_path), "20"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout.splitlines()[-1])
    assert counted["kills"] == 20
    assert counted["stages_saved"] > 0
    assert counted["quantizations"] > 0
