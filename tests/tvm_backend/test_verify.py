"""A library that computes something else than its graph is not written, and is found on the machine that runs it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tvm_backend
from cat_plugin.errors import CompileError, LibraryError
from cat_plugin.graph.bundle import export_bundle
from tests.tvm_backend import qdq_models as models
from tvm_backend import checking
from tvm_backend.kernels.kernel import Kernel
from tvm_backend.verify import read_checks


class Head(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.fc = models.Quantize(8), models.QLinear(torch.nn.Linear(6, 3), 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.q(x))


@pytest.fixture(scope="module")
def program() -> Any:
    return models.exported(Head(), torch.randn(4, 6))


@pytest.fixture(scope="module")
def portable(program: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("verify")
    bundle = export_bundle(program, torch.randn(8, 6), folder / "bundle")
    report = tvm_backend.compile(bundle, "portable", folder / "model.so", cache=False, batch_sizes=(7,))
    return report, report.path


@pytest.fixture
def library(portable: tuple[Any, Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    for path in portable[1].parent.glob("model.*"):
        shutil.copy(path, tmp_path / path.name)
    return tmp_path / "model.so"


def test_every_variant_is_checked_that_runs_here(portable: tuple[Any, Path]) -> None:
    report, _ = portable
    for variant in report.variants:
        reason = checking.obstacle(variant)
        assert variant["checked"] == ("" if reason is None else f"not checked: {reason}")
    assert len(report.notes) == sum(bool(variant["checked"]) for variant in report.variants)


def test_a_library_for_another_machine_is_not_checked(library: Path) -> None:
    manifest = json.loads(library.with_suffix(".json").read_text())
    variant = {**manifest["variants"][0], "machine": "riscv64"}
    checks = read_checks(manifest, library)
    reason = checking._check(variant, manifest, library.parent, checks, None)
    assert reason.startswith("not checked: ")
    assert "(built for riscv64)" in reason


def test_a_library_that_a_kernel_breaks_is_not_written(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Kernel.compensation
    monkeypatch.setattr(Kernel, "compensation", lambda self, weight: right(self, weight) + 100)
    with pytest.raises(CompileError, match=r"does not compute what its graph computes: rows 0 .* dump_dir="):
        tvm_backend.compile(program, out=tmp_path / "model.so", cache=False)
    assert list(tmp_path.iterdir()) == []


class Deep(torch.nn.Module):
    """Four layers, of which `fourth` alone has eleven inputs, behind a branch that joins again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"first": (6, 8), "second": (8, 8), "third": (8, 11), "fourth": (11, 8), "head": (8, 3)}
        self.layers = torch.nn.ModuleDict(
            {name: models.QLinear(torch.nn.Linear(*size), 8) for name, size in sizes.items()}
        )
        self.grids = torch.nn.ModuleDict({name: models.Quantize(8) for name in sizes})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self._layer("first", x).relu()
        y = self._layer("fourth", self._layer("third", self._layer("second", x).relu())).relu()
        return self._layer("head", x + y)

    def _layer(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.layers[name](self.grids[name](x))


def test_the_node_that_a_kernel_breaks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Kernel.compensation

    def broken(self: Kernel, weight: np.ndarray) -> np.ndarray:
        return right(self, weight) + (300 if weight.shape[1] == 11 else 0)

    program = models.exported(Deep(), torch.randn(64, 6))
    monkeypatch.setattr(Kernel, "compensation", broken)
    message = r"The first node whose result differs is node '\w+' in module 'layers.fourth', aten\.linear\.default\. Nothing was"
    with pytest.raises(CompileError, match=message):
        tvm_backend.compile(program, out=tmp_path / "model.so", cache=False)


def test_load_verifies_without_torch(library: Path) -> None:
    code = (
        "import sys, tvm_backend; tvm_backend.load(sys.argv[1], verify=True);"
        "sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    )
    subprocess.run([sys.executable, "-c", code, str(library)], check=True)


def test_a_processor_that_computes_otherwise_is_found(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = tvm_backend.Library.flat
    monkeypatch.setattr(
        tvm_backend.Library, "flat", lambda self, *x: [each + np.float32(0.1) for each in right(self, *x)]
    )
    tvm_backend.load(library)
    with pytest.raises(LibraryError, match="does not compute what its model computes on this machine"):
        tvm_backend.load(library, verify=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes; the manifest says"),
        (lambda path: path.write_bytes(b"\0" * path.stat().st_size), "does not match the sha256"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_a_damaged_file_of_rows_is_named(library: Path, damage: Any, message: str) -> None:
    damage(library.with_name("model.checks.safetensors"))
    tvm_backend.load(library)
    with pytest.raises(LibraryError, match=f"model.checks.safetensors .*{message}"):
        tvm_backend.load(library, verify=True)


def test_a_library_of_an_earlier_release_says_that_it_has_no_rows(library: Path) -> None:
    described = library.with_suffix(".json")
    manifest = json.loads(described.read_text())
    del manifest["checks"]
    described.write_text(json.dumps(manifest))
    tvm_backend.load(library)
    with pytest.raises(LibraryError, match="carries no rows to be checked by"):
        tvm_backend.load(library, verify=True)
    described.write_text(json.dumps({**manifest, "checks": {"file": "../x", "sha256": "0", "size": 1}}))
    with pytest.raises(LibraryError, match="'checks' is not what belongs there"):
        tvm_backend.load(library)


def test_a_bundle_without_rows_is_checked_on_made_up_ones(program: Any, tmp_path: Path) -> None:
    bundle = export_bundle(program, torch.randn(2, 6), tmp_path / "bundle", checks=False)
    report = tvm_backend.compile(bundle, out=tmp_path / "model.so", cache=False)
    assert report.notes == ()
    tvm_backend.load(report.path, verify=True)
