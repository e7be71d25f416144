"""``cat-ptq compile``."""

from __future__ import annotations

import shutil
import subprocess
import sys
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
        (["--tokens", "7"], "takes inputs of one size"),
        (["--tokens", "0"], "--tokens"),
    ],
)
def test_bad_compile_options(
    workspace: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    pytest.importorskip("tvm", reason="TVM is not installed")
    assert main(["compile", str(workspace / "bundle"), *words]) == 2
    assert message in capsys.readouterr().err


def test_what_was_compiled_is_answered_without_tvm(
    workspace: Path, library: Path, tmp_path: Path, as_json: AsJson
) -> None:
    """Also where another bundle holds the same graph; with other options it is compiled anew."""
    code = (
        "import sys\nfrom cat_plugin.cli import main\n"
        "assert main([*sys.argv[1:], '--quiet']) == 0\n"
        "assert not {'torch', 'tvm', 'sklearn'} & set(sys.modules)"
    )
    words = ["compile", str(workspace / "bundle"), "--out", str(tmp_path / "x.so"), "--batch-sizes", "1"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.so").read_bytes() == library.read_bytes()
    assert (tmp_path / "x.json").read_text() == library.with_suffix(".json").read_text().replace(
        f'"{library.stem}.', '"x.'
    )


def test_a_note_is_no_answer_where_something_differs(
    workspace: Path, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cat_plugin.graph.bundle import read_bundle
    from tvm_backend import answers, cache

    bundle = read_bundle(workspace / "bundle")
    assert answers.find(bundle, "native", [1]) is not None
    assert answers.find(bundle, "native", [2]) is None
    assert answers.find(bundle, "portable", [1]) is None
    assert answers.find(object(), "native", [1]) is None
    with monkeypatch.context() as patched:
        patched.setattr(answers, "cpu_features", lambda: frozenset({"sse"}))
        assert answers.find(bundle, "native", [1]) is None
    with monkeypatch.context() as patched:
        patched.setattr(cache, "sources", lambda: [Path(__file__)])
        assert answers.find(bundle, "native", [1]) is None
    shutil.copytree(cache.directory().parent, tmp_path / "cache")
    monkeypatch.setenv("CAT_CACHE_DIR", str(tmp_path / "cache"))
    assert answers.find(bundle, "native", [1]) is not None
    for built in (tmp_path / "cache" / "tvm").rglob("0.so"):
        built.write_bytes(b"damaged")
    assert answers.find(bundle, "native", [1]) is None
