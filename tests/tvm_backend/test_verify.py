"""A library that computes something else than its graph is not written, and is found on the machine that runs it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tvm_backend
from cat_plugin.errors import CompileError, LibraryError
from cat_plugin.graph.bundle import export_bundle
from cat_plugin.graph.checks import Checks, Run
from cat_plugin.graph.sampling import make_checks
from tests.tvm_backend import qdq_models as models
from tvm_backend import build, checking, lockstep
from tvm_backend.kernels.kernel import Kernel
from tvm_backend.lockstep import unexplained, with_levels
from tvm_backend.verify import read_checks


class Head(torch.nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
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


def test_a_fault_within_what_one_level_moves_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Kernel.compensation

    def broken(self: Kernel, weight: np.ndarray) -> np.ndarray:
        return right(self, weight) + (300 if weight.shape[1] == 11 else 0)

    program = models.exported(Deep(), torch.randn(64, 6))
    bounds = replace(make_checks(program, (torch.randn(5, 6),)), typical=1.0, worst=1.0)
    monkeypatch.setattr(Kernel, "compensation", broken)
    monkeypatch.setattr(build, "checks_of", lambda *_: bounds)
    with pytest.raises(CompileError, match=r"in module 'layers\.fourth'"):
        tvm_backend.compile(program, out=tmp_path / "model.so", cache=False)


def test_models_of_one_structure_are_compared_level_by_level_once(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []

    def counted(*arguments: Any) -> Any:
        compared.append(arguments)
        return unexplained(*arguments)

    def fault(self: Checks, _call: Any) -> str | None:
        return "off by more than rounding" if self.worst == checking._ROUNDING else None

    monkeypatch.setenv("CAT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(lockstep, "unexplained", counted)
    monkeypatch.setattr(Checks, "fault", fault)
    other = models.exported(Head(1), torch.randn(4, 6))
    counts = []
    for model in (program, other, models.exported(Deep(), torch.randn(64, 6))):
        tvm_backend.compile(model, out=tmp_path / "model.so")
        counts.append(len(compared))
    assert lockstep.structure_of(program) == lockstep.structure_of(other)
    assert 0 < counts[0] == counts[1] < counts[2]


def _on_an_edge(program: Any, rows: torch.Tensor) -> torch.Tensor:
    """The rows, the first value of the first of them on the edge between two levels of the first quantizer."""
    first = next(node for node in program.graph.nodes if "quantize_per_tensor" in str(node.target))
    scale, zero_point = first.args[1:3]
    rows[0, 0] = (float(zero_point) % 7 + 3.5 - zero_point) * scale
    return rows


def test_levels_on_either_side_of_an_edge_are_right_and_others_are_not(program: Any) -> None:
    rows = _on_an_edge(program, torch.randn(5, 6))
    run = with_levels(program).module(check_guards=False)
    with torch.no_grad():
        output, level = (each.numpy() for each in run(rows))
    assert unexplained(program, [rows.numpy()], [output, level]) is None
    explained = []
    for step in (-1, 1):  # the other side of the edge, and the level beyond
        moved = level.copy()
        moved[0, 0] = int(level[0, 0]) + step
        changed = _behind(program, moved)
        explained.append(unexplained(program, [rows.numpy()], [changed, moved]) is None)
        # outputs that do not follow from the level, whichever it is
        assert unexplained(program, [rows.numpy()], [output, moved]) is not None
    assert sorted(explained) == [False, True]


class _Called(torch.nn.Module):
    """Arguments with names that Python has functions of."""

    def forward(self, input: torch.Tensor, bytes: torch.Tensor) -> torch.Tensor:
        quantized = torch.ops.quantized_decomposed
        grid = (0.1, 3, -128, 127, torch.int8)
        levels = quantized.quantize_per_tensor.default(input, *grid)
        return quantized.dequantize_per_tensor.default(levels, *grid) + bytes


def test_arguments_may_be_called_as_functions_of_python_are() -> None:
    rows = torch.randn(4, 6), torch.randn(4, 6)
    called = torch.export.export(_Called(), rows)
    output, levels = with_levels(called).module()(*rows)
    assert torch.equal(output, _Called()(*rows))
    assert levels.dtype == torch.int8


def _behind(program: Any, levels: np.ndarray) -> np.ndarray:
    """What the program makes of the levels of its first quantizer."""

    class Given(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> Any:
            chosen = "quantize_per_tensor" in str(node.target) and "dequantize" not in str(node.target)
            return torch.from_numpy(levels) if chosen else super().run_node(node)

    with torch.no_grad():
        return Given(program.module(check_guards=False)).run(torch.zeros(5, 6)).numpy()


def test_a_library_whose_values_lie_on_edges_is_written(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bounds of nothing at all: what is accepted then is accepted level by level."""
    rows = _on_an_edge(program, torch.randn(5, 6))
    checks = make_checks(program, (rows,))
    moved = Run(checks.runs[1].inputs, tuple(each + 0.01 for each in checks.runs[1].outputs))
    monkeypatch.setattr(checking, "expected", lambda *_: Checks((moved,), 0.0, 0.0))
    report = tvm_backend.compile(program, out=tmp_path / "model.so", cache=False)
    assert report.notes == ()


class Half(Deep):
    """Computes in numbers of 16 bits between two layers, where a library may keep more."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._layer("first", x).bfloat16() * 1.3 + 0.1
        return self._layer("second", (y * y + y).float())


def test_what_numbers_of_16_bits_round_is_no_fault(tmp_path: Path) -> None:
    program = models.exported(Half(), torch.randn(64, 6))
    report = tvm_backend.compile(program, out=tmp_path / "model.so", cache=False)
    assert report.notes == ()


def test_a_batch_size_that_a_library_has_no_code_for_is_named(library: Path) -> None:
    described = library.with_suffix(".json")
    manifest = json.loads(described.read_text())
    described.write_text(json.dumps({**manifest, "batch_sizes": [7, 9]}))
    with pytest.raises(
        LibraryError, match="names 9 in 'batch_sizes', and the library has no code of its own"
    ):
        tvm_backend.load(library)


def test_load_verifies_without_torch(library: Path) -> None:
    code = (
        "import sys, tvm_backend; tvm_backend.load(sys.argv[1], verify=True);"
        "sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    )
    subprocess.run([sys.executable, "-c", code, str(library)], check=True)


_WITHOUT_TORCH = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, Absent())
from cat_plugin.cli import main
sys.exit(main(["compile", *sys.argv[1:]]))
"""


def test_compiling_without_torch_takes_what_was_compiled_or_says_what_is_missing(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAT_CACHE_DIR", str(tmp_path / "cache"))
    bundle = export_bundle(program, torch.randn(8, 6), tmp_path / "bundle")
    out = tmp_path / "model.so"
    words = [sys.executable, "-c", _WITHOUT_TORCH, str(bundle), "--out", str(out)]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    message = " ".join(result.stderr.split())
    assert message.startswith("error: PyTorch is not installed, which reads a bundle's graph: pip install")
    assert not out.exists()
    tvm_backend.compile(bundle, out=tmp_path / "first.so")
    subprocess.run(words, capture_output=True, check=True)
    tvm_backend.load(out, verify=True)


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
