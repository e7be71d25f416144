"""``cat-ptq benchmark`` on the digits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cat_plugin.cli import main

AsJson = Callable[..., dict[str, Any]]
FACTORY = "examples.digits.model:build"


def test_benchmark_beside_pytorch(
    workspace: Path, library: Path, as_json: AsJson, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["benchmark", str(library), "--batch", "1,3", "--seconds", "0"]
    beside = [
        "--bundle",
        workspace / "bundle",
        "--model",
        FACTORY,
        "--weights",
        workspace / "digits.safetensors",
    ]
    found = as_json(*words, *beside, "--threads", "1")
    named = [(row["runtime"], row["batch"]) for row in found["rows"]]
    runtimes = ["compiled library", "PyTorch, quantized graph", "PyTorch, float32 model"]
    assert named == [(runtime, batch) for runtime in runtimes for batch in (1, 3)]
    assert all(0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] for row in found["rows"])
    assert found["threads"] == 1
    assert main(words) == 0
    assert "compiled library" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "0"], "--batch"),
        (["--batch", ""], "--batch is empty"),
        (["--model", "nowhere:build"], "nowhere"),
        (["--bundle", "missing"], "missing"),
    ],
)
def test_bad_benchmarks(
    library: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["benchmark", str(library), "--seconds", "0", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
