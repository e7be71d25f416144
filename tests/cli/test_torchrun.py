"""``cat-ptq quantize`` in several processes started by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from .conftest import RECIPE, quantize_words
from .test_quantize import logits_of

pytest.importorskip("torch.distributed.run")


def torchrun(words: list[str]) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*start, "-m", "cat_plugin", *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "COLUMNS": "300",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        },
    )


def test_two_processes_write_the_bundle_of_one(workspace: Path, tmp_path: Path) -> None:
    done = torchrun(["--format", "csv", *quantize_words(workspace, out=str(tmp_path / "bundle"))])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("calibration_samples") == 1  # the first process alone says what was done
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    one, two = (logits_of(root / "bundle", workspace / "test.npz") for root in (workspace, tmp_path))
    np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-4 * np.abs(one).max())


def test_what_cannot_be_divided_ends_both_processes(workspace: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("preset: fast", "preset: balanced"))
    done = torchrun(quantize_words(workspace, recipe=str(recipe), out=str(tmp_path / "bundle")))
    assert done.returncode != 0
    assert "expected preset 'fast'" in done.stderr
    assert not (tmp_path / "bundle").exists()
