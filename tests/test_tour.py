"""The notebook runs from its first cell to its last, and what is stored is stored without outputs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tour() -> Any:
    return nbformat.read(ROOT / "examples" / "tour.ipynb", as_version=4)


def test_it_is_stored_without_outputs(tour: Any) -> None:
    code = [cell for cell in tour.cells if cell.cell_type == "code"]
    assert len(code) > 5
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


def test_it_runs(tour: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    pytest.importorskip("tvm", reason="TVM is not installed")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, sys.path)]))
    nbclient.NotebookClient(tour, timeout=600, kernel_name="python3").execute(cwd=str(ROOT))
    said = "".join(
        output.get("text", "")
        for cell in tour.cells
        for output in cell.get("outputs", ())
        if output.output_type == "stream"
    )
    assert "rounded by somebody else" in said
    assert "kernels" in said
