"""``cat-ptq compile``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cat_plugin.cli import main

AsJson = Callable[..., dict[str, Any]]


def test_compile_says_what_it_did(workspace: Path, library: Path, tmp_path: Path, as_json: AsJson) -> None:
    again = as_json("compile", workspace / "bundle", "--out", tmp_path / "x.so", "--batch-sizes", "1")
    assert again["cached"]
    assert again["bytes"] == library.stat().st_size
    assert again["float_ops"] == []
    assert again["batch_sizes"] == [1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "{kind: cuda}"], "not valid JSON"),
        (["--target", "no-such-processor"], "no-such-processor"),
        (["--batch-sizes", "1,x"], "--batch-sizes"),
        (["--out", "model.dll"], "must end in .so"),
    ],
)
def test_bad_compile_options(
    workspace: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    pytest.importorskip("tvm", reason="TVM is not installed")
    assert main(["compile", str(workspace / "bundle"), *words]) == 2
    assert message in capsys.readouterr().err
