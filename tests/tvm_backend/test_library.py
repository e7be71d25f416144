"""Compile, load, call: a library gives what torch gives, without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import tvm_backend


def assert_close(actual, wanted):
    """Equal but for activations that torch's rounded sums and the exact ones put on two sides of a rounding edge."""
    error = np.abs(actual - wanted).max(axis=1)
    assert np.median(error) < 1e-6
    assert error.max() < 0.02 * np.abs(wanted).max()


def expected(model, x):
    with torch.no_grad():
        return model(torch.from_numpy(x)).numpy()


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_logits_are_those_of_torch(compiled, images, batch):
    report, model, _ = compiled
    x = images[:batch]
    assert_close(tvm_backend.load(report.path)(x), expected(model, x))


def test_rounding_edges_are_rare(compiled):
    """A pass that rounded otherwise than torch would move values of every image, not of one in a thousand."""
    report, model, _ = compiled
    x = np.random.default_rng(2).normal(size=(200, 3, 16, 16)).astype("float32")
    error = np.abs(tvm_backend.load(report.path)(x) - expected(model, x)).max(axis=1)
    assert (error > 1e-5).sum() <= 2


def test_report_names_every_kernel(compiled):
    report, _, _ = compiled
    kinds = [kernel.kind for kernel in report.kernels]
    assert kinds.count("conv") == 7
    assert kinds.count("linear") == 1
    assert kinds[0] == "quantize"
    assert kinds[-1] == "cluster_affine"
    assert report.float_ops == ()
    assert "operators in float32: none" in str(report)
    json.dumps(report.to_dict())


def test_two_bit_weights_are_stored_in_two_bits(compiled):
    report, _, _ = compiled
    kernel = next(k for k in report.kernels if k.name.startswith("conv2d_3x3_64_64_"))
    assert kernel.weight_bits == 2
    assert 64 * 64 * 9 // 4 <= kernel.weight_bytes <= 64 * 64 * 9 // 4 + 256


def test_needs_neither_torch_nor_sklearn_nor_inc(compiled, images, tmp_path):
    report, model, _ = compiled
    np.save(tmp_path / "x.npy", images)
    script = (
        "import sys, numpy as np, tvm_backend\n"
        "y = tvm_backend.load(sys.argv[1])(np.load(sys.argv[2]))\n"
        "np.save(sys.argv[3], y)\n"
        "bad = [m for m in ('torch', 'sklearn', 'neural_compressor') if m in sys.modules]\n"
        "sys.exit(f'imported: {bad}' if bad else 0)\n"
    )
    command = [
        sys.executable,
        "-c",
        script,
        str(report.path),
        str(tmp_path / "x.npy"),
        str(tmp_path / "y.npy"),
    ]
    subprocess.run(command, check=True, env={**os.environ, "TVM_USE_RUNTIME_LIB": "1"})
    assert_close(np.load(tmp_path / "y.npy"), expected(model, images))


def test_dump_shows_every_pass_though_the_result_is_in_the_cache(tmp_path, monkeypatch):
    from tests.tvm_backend import qdq_models as models

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.fc = models.Quantize(8), models.QLinear(torch.nn.Linear(6, 3), 4)

        def forward(self, x):
            return self.fc(self.q(x))

    monkeypatch.setenv("CAT_CACHE_DIR", str(tmp_path / "cache"))
    program, out, dump = models.exported(Head(), torch.randn(4, 6)), tmp_path / "model.so", tmp_path / "dump"
    assert not tvm_backend.compile(program, out=out).cached
    assert tvm_backend.compile(program, out=out).cached
    assert not tvm_backend.compile(program, out=out, dump_dir=dump).cached
    assert (
        "nn.linear" in (dump / "00_Imported.py").read_text()
        or "matmul" in (dump / "00_Imported.py").read_text()
    )
    assert "LinearSpec" in sorted(dump.glob("*.py"))[-1].read_text()
    lowered = next((dump / "library").glob("*_LowerKernels.py"))
    assert "linear_6_3" in lowered.read_text()
