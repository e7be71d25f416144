"""A directory as a user would have it, with the bundle made from what lies there."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

RECIPE = """\
quantization:
  algorithm: cat
  cat: {w_bits: 2, a_bits: 4, preset: fast, num_clusters: 8, mode: diagonal}
"""


def quantize_words(root: Path, **changes: str) -> list[str]:
    """The words of ``cat-ptq quantize`` for the files in `root`."""
    options = {
        "model": "examples.digits.model:build",
        "weights": str(root / "digits.safetensors"),
        "data": str(root / "calibration.npz"),
        "out": str(root / "bundle"),
    } | changes
    recipe = options.pop("recipe", str(root / "recipe.yaml"))
    return ["quantize", recipe, *(word for key, value in options.items() for word in (f"--{key}", value))]


@contextlib.contextmanager
def loggers_as_they_were() -> Iterator[None]:
    """Commands set how much is logged, as programs do; what runs behind them in this process is not to be quiet too."""
    loggers = [logging.getLogger(name) for name in ("cat_plugin", "tvm_backend")]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers = handlers


@pytest.fixture(autouse=True)
def _loggers() -> Iterator[None]:
    with loggers_as_they_were():
        yield


@pytest.fixture(scope="session")
def workspace(digits_network: Any, digits_split: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipe, weights, data and a bundle."""
    pytest.importorskip("neural_compressor", reason="Neural Compressor is not installed")
    from safetensors.torch import save_file

    from cat_plugin.cli import main

    root = tmp_path_factory.mktemp("workspace")
    (root / "recipe.yaml").write_text(RECIPE)
    save_file(digits_network.state_dict(), root / "digits.safetensors")
    np.savez(root / "calibration.npz", inputs=digits_split.calibration[0].numpy())
    for name, (images, labels) in {"tune": digits_split.tune, "test": digits_split.test}.items():
        np.savez(root / f"{name}.npz", inputs=images.numpy(), labels=labels.numpy())
    with loggers_as_they_were():
        assert main(quantize_words(root)) == 0
    return root


@pytest.fixture(scope="session")
def library(workspace: Path) -> Path:
    """The bundle, compiled."""
    pytest.importorskip("tvm", reason="TVM is not installed")
    from cat_plugin.cli import main

    path = workspace / "library" / "digits.so"
    words = ["compile", str(workspace / "bundle"), "--out", str(path), "--batch-sizes", "1", "--quiet"]
    with loggers_as_they_were():
        assert main(words) == 0
    return path


@pytest.fixture
def as_json(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Run a command that succeeds and read what it prints as JSON."""
    from cat_plugin.cli import main

    def run(*words: str | Path) -> dict[str, Any]:
        capsys.readouterr()
        assert main([*map(str, words), "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return run
