"""Whole models on CUDA: through every pass, TVM's CUDA runtime and the virtual machine, on the emulated device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import cat_plugin.graph.op  # noqa: F401
import tvm_backend
from cat_plugin.graph.export import export_program
from cat_plugin.ptq import QuantSpec, quantize
from tests.tvm_backend import cuda_tools, qdq_models
from tests.tvm_backend.test_inverted_residuals import MobileNet
from tests.zoo import ZOO
from tvm_backend import cuda_build

emulated = pytest.mark.skipif(cuda_tools.available() is not None, reason=str(cuda_tools.available()))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object, np.ndarray]:
    """A small ResNet with a cluster-affine step, compiled with the emulator in the place of nvcc."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)
    model = qdq_models.calibrated(qdq_models.QResNet(), x)
    path = tmp_path_factory.mktemp("cuda") / "model.so"
    with pytest.MonkeyPatch.context() as patch:
        real = cuda_build.pack_imports
        patch.setattr(cuda_build, "pack_imports", lambda arch: real(arch, cuda_tools.emulate))
        program = qdq_models.exported(model, x)
        report = tvm_backend.compile(program, target=cuda_tools.target(), out=path, batch_sizes=[1])
    with torch.no_grad():
        return path, report, model(x).numpy()


def _run(path: Path, folder: Path, order: str = "forward") -> str:
    """All of ``x.npy`` and each row to ``y.npz``, in a process that has nothing but TVM's runtime; what the emulator told."""
    script = (
        "import sys, numpy as np, tvm_backend\n"
        "run = tvm_backend.load(sys.argv[1])\n"
        "x = np.load(sys.argv[2])\n"
        "np.savez(sys.argv[3], run(x), *[run(x[i : i + 1]) for i in range(len(x))])\n"
    )
    environment = dict(os.environ, LD_LIBRARY_PATH=str(cuda_tools.driver_folder()), TVM_USE_RUNTIME_LIB="1")
    environment |= {"CAT_EMULATOR_TELL": "1", "CAT_EMULATOR_ORDER": order}
    command = [sys.executable, "-c", script, str(path), str(folder / "x.npy"), str(folder / "y.npz")]
    done = subprocess.run(
        command, check=False, env=environment, timeout=120, stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@emulated
def test_model_gives_what_torch_gives(library: tuple[Path, object, np.ndarray], tmp_path: Path) -> None:
    """With host arrays in and out, in a process that has nothing but TVM's runtime."""
    path, report, expected = library
    assert {kernel.variant for kernel in report.kernels} >= {"cuda_mma"}  # type: ignore[attr-defined]
    torch.manual_seed(0)
    np.save(tmp_path / "x.npy", torch.randn(4, 3, 16, 16).numpy())
    told = _run(path, tmp_path)
    with np.load(tmp_path / "y.npz") as found:
        np.testing.assert_allclose(found["arr_0"], expected, atol=1e-6)
        # Rows one by one, from the second on by a graph, which has to read each.
        for i in range(4):
            np.testing.assert_array_equal(found[f"arr_{i + 1}"], found["arr_0"][i : i + 1])
    launched = [int(line.split()[-1]) for line in told.splitlines() if line.startswith("graph of")]
    assert len(launched) == 3
    assert min(launched) > 5


@emulated
def test_inverted_residuals_run_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small MobileNetV2, whose values share memory: layers of 96 channels, wider and narrower ones in turn, a shortcut."""
    torch.manual_seed(4)
    x = 2 * torch.randn(2, 3, 16, 16)
    model = qdq_models.calibrated(MobileNet(32, 96), x)
    real = cuda_build.pack_imports
    monkeypatch.setattr(cuda_build, "pack_imports", lambda arch: real(arch, cuda_tools.emulate))
    path, program = tmp_path / "model.so", qdq_models.exported(model, x)
    report = tvm_backend.compile(program, target=cuda_tools.target(), out=path, cache=False, batch_sizes=[1])
    assert {kernel.output for kernel in report.kernels} >= {(8, 8, 96), (8, 8, 32), (4, 4, 96)}
    np.save(tmp_path / "x.npy", x.numpy())
    runs = []
    for order in ("forward", "reverse"):
        _run(path, tmp_path, order)
        with np.load(tmp_path / "y.npz") as found:
            runs.append([found[name] for name in found.files])
    # One output step of the last quantizer, where torch's rounded sums lie on the other side of an edge.
    step = float(model.q_row.scale * (model.fc.weight.q.abs().float() * model.fc.weight.scale[:, None]).max())
    with torch.no_grad():
        np.testing.assert_allclose(runs[0][0], model(x).numpy(), atol=step + 1e-5)
    for i in range(2):
        np.testing.assert_array_equal(runs[0][i + 1], runs[0][0][i : i + 1])
    for forward, reverse in zip(*runs, strict=True):
        np.testing.assert_array_equal(forward, reverse)


class _PartlyFloat(torch.nn.Module):
    """Layers without quantization, of several kinds, around one with."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.Linear(16, 5)
        self.q = qdq_models.Quantize(8)
        self.conv = qdq_models.QConv(torch.nn.Conv2d(8, 16, 3, 1, 1), 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.gelu(self.first(x))
        x = torch.sigmoid(self.conv(self.q(x)))
        return torch.softmax(self.last(x.mean((2, 3))), 1)


@emulated
def test_operators_left_in_float_run_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    x = torch.randn(3, 3, 12, 12)
    model = qdq_models.calibrated(_PartlyFloat(), x)
    real = cuda_build.pack_imports
    monkeypatch.setattr(cuda_build, "pack_imports", lambda arch: real(arch, cuda_tools.emulate))
    program = qdq_models.exported(model, x)
    report = tvm_backend.compile(program, target=cuda_tools.target(), out=tmp_path / "model.so", cache=False)
    assert "nn.conv2d" in report.float_ops
    np.save(tmp_path / "x.npy", x.numpy())
    _run(report.path, tmp_path)
    with torch.no_grad(), np.load(tmp_path / "y.npz") as found:
        wanted = model(x).numpy()
        np.testing.assert_allclose(found["arr_0"], wanted, atol=1e-3)
        np.testing.assert_allclose(found["arr_1"], wanted[:1], atol=1e-3)


@emulated
def test_a_vision_transformer_runs_by_kernels_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention's products in integers, softmax and LayerNorm that store integers, and one graph for a single image."""
    network = ZOO["vit"]
    model, inputs = network.build(), network.inputs(16)
    spec = QuantSpec(w_bits=8, a_bits=8, attention_bits=8, preset="fast", num_samples=16)
    quantized, _ = quantize(model, spec, [inputs])
    program = export_program(quantized, inputs[:2])
    real = cuda_build.pack_imports
    monkeypatch.setattr(cuda_build, "pack_imports", lambda arch: real(arch, cuda_tools.emulate))
    path = tmp_path / "model.so"
    report = tvm_backend.compile(program, target=cuda_tools.target(), out=path, cache=False, batch_sizes=[1])
    found = {(kernel.kind, kernel.variant) for kernel in report.kernels}
    assert found >= {("product", "cuda_mma"), ("rows", "cuda"), ("linear", "cuda_mma")}
    np.save(tmp_path / "x.npy", inputs[:3].numpy())
    told = _run(path, tmp_path)
    assert told.count("graph of") == 2
    with torch.no_grad(), np.load(tmp_path / "y.npz") as results:
        expected = program.module(check_guards=False)(inputs[:3]).numpy()
        atol = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(results["arr_0"], expected, atol=atol)
        for i in range(3):
            np.testing.assert_allclose(results[f"arr_{i + 1}"], expected[i : i + 1], atol=atol)


@pytest.mark.skipif(bool(os.environ.get("LD_LIBRARY_PATH")), reason="a CUDA driver may be on the path")
def test_without_a_driver_the_error_says_what_is_needed(library: tuple[Path, object, np.ndarray]) -> None:
    script = "import sys, tvm_backend\ntvm_backend.load(sys.argv[1])\n"
    done = subprocess.run(
        [sys.executable, "-c", script, str(library[0])],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if done.returncode == 0:
        pytest.skip("this machine has a CUDA driver")
    assert "LibraryError" in done.stderr
    assert "NVIDIA's driver" in done.stderr
