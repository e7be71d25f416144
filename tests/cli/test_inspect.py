"""``cat-ptq inspect``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cat_plugin.cli import main

AsJson = Callable[..., dict[str, Any]]


def test_inspect_lists_layers(workspace: Path, capsys: pytest.CaptureFixture[str], as_json: AsJson) -> None:
    found = as_json("inspect", str(workspace / "bundle"))
    assert {layer["w_bits"] for layer in found["layers"]} == {2, 8}
    assert main(["inspect", str(workspace / "bundle")]) == 0
    assert "stem.0" in capsys.readouterr().out


def test_inspect_describes_a_library(
    library: Path, as_json: AsJson, capsys: pytest.CaptureFixture[str]
) -> None:
    found = as_json("inspect", library)
    assert found["batch_sizes"] == [1]
    assert any(kernel["weight_bits"] == 2 for kernel in found["kernels"])
    assert main(["inspect", str(library)]) == 0
    assert "2 bit" in capsys.readouterr().out
