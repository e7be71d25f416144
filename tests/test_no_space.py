"""No space and no permission: one clear error from everything that writes, and nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cat_plugin
from cat_plugin.errors import BundleError, CATError, CompileError, QuantizationError
from cat_plugin.ptq import QuantSpec, quantize
from tests.disks import files_of_at_most, mounted, read_only
from tests.ptq.models import SmallResNet, randomise, small_inputs

_SPEC = QuantSpec(preset="balanced", unit_steps=2, model_steps=0, refinement_steps=0, batch_size=8)


@pytest.fixture(scope="module")
def made() -> tuple[Any, Any, Any]:
    """A network, its calibration inputs, and the corrected model of them."""
    network, inputs = randomise(SmallResNet()), small_inputs(32, 3, 12, 12)
    quantized, _ = quantize(network, QuantSpec(preset="fast"), inputs)
    return network, inputs, cat_plugin.correct(quantized, network, [inputs])


def bundle(made: Any, place: Path) -> None:
    cat_plugin.export_bundle(made[2], made[1][:2], place / "bundle")


def saved(made: Any, place: Path) -> None:
    cat_plugin.save(made[2], place / "saved")


def checkpoint(made: Any, place: Path) -> None:
    quantize(made[0], _SPEC, made[1], resume=place / "state")


def library(made: Any, place: Path) -> None:
    tvm_backend = pytest.importorskip("tvm_backend")
    pytest.importorskip("tvm")
    from cat_plugin.graph.export import export_program

    program = export_program(made[2], made[1][:2])
    tvm_backend.compile(program, out=place / "model.so", cache=False)


def files_in(place: Path) -> list[Path]:
    """What was left, but for the last state of a checkpoint that was whole."""
    found = {path for path in place.rglob("*") if path.is_file()}
    for state in place.rglob("state.json"):
        found -= {state, *(state.with_name(name) for name in json.loads(state.read_text())["files"])}
    return sorted(found)


WRITERS: list[tuple[Callable[[Any, Path], None], type[CATError]]] = [
    (bundle, BundleError),
    (saved, BundleError),
    (checkpoint, QuantizationError),
    (library, CompileError),
]


@pytest.mark.parametrize(("write", "kind"), WRITERS)
@pytest.mark.parametrize("size", ["4k", "24k"])
def test_a_full_disk(made: Any, tmp_path: Path, write: Any, kind: type[CATError], size: str) -> None:
    with mounted(tmp_path, f"size={size}"):
        with pytest.raises(kind, match=r"cannot write|linking failed") as caught:
            write(made, tmp_path)
        assert "space" in str(caught.value)
        assert files_in(tmp_path) == []


@pytest.mark.parametrize(("write", "kind"), WRITERS)
def test_a_file_that_may_not_grow(made: Any, tmp_path: Path, write: Any, kind: type[CATError]) -> None:
    with files_of_at_most(5000), pytest.raises(kind, match=r"cannot write|linking failed|could not build"):
        write(made, tmp_path)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(("write", "kind"), WRITERS)
def test_a_read_only_directory(made: Any, tmp_path: Path, write: Any, kind: type[CATError]) -> None:
    with read_only(tmp_path / "fixed") as place, pytest.raises(kind, match=r"cannot write.*writable place"):
        write(made, place)


def test_what_was_there_survives_a_failed_replacement(made: Any, tmp_path: Path) -> None:
    bundle(made, tmp_path)
    saved(made, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for write in (bundle, saved):
        with files_of_at_most(5000), pytest.raises(BundleError):
            write(made, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_no_space_for_cached_activations(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mapped files are given their space at once: a page that cannot be written later would kill the process."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    spec = QuantSpec(preset="fast", memory_mb=1)
    with files_of_at_most(5000), pytest.raises(QuantizationError, match="cannot write activations"):
        quantize(made[0], spec, small_inputs(300, 3, 24, 24))
    assert list(tmp_path.iterdir()) == []


def test_no_compiler(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm")
    from tvm_backend import linker

    monkeypatch.setattr(linker.shutil, "which", lambda _: None)
    monkeypatch.setattr(linker.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(CompileError, match=r"no C\+\+ compiler.*pip install ziglang"):
        library(made, tmp_path)
    assert list(tmp_path.iterdir()) == []
