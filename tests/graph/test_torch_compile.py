"""A bundle's program under ``torch.compile`` (inductor), PyTorch's own way to run it fast."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

import cat_plugin
from cat_plugin.cluster_affine import ClusterAffine
from cat_plugin.graph.bundle import read_bundle
from cat_plugin.ptq import QuantSpec, quantize


@pytest.mark.skipif(
    (shutil.which("c++") or shutil.which("g++")) is None, reason="inductor needs a C++ compiler"
)
def test_inductor_computes_what_the_bundle_computes_at_any_batch_size(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip
    x = torch.randn(48, 3, 8, 8)
    quantized, _ = quantize(network, QuantSpec(w_bits=4, a_bits=4, preset="fast", num_samples=48), x)
    step = ClusterAffine(mode="full", n_clusters=3, random_state=0)
    corrected = cat_plugin.correct(quantized, network, x.split(16), step)
    bundle = cat_plugin.export_bundle(corrected, x[:2], tmp_path / "bundle")
    program = read_bundle(bundle).program().module()
    assert "cluster_affine" in "".join(str(node.target) for node in program.graph.nodes)
    torch._dynamo.reset()
    compiled = torch.compile(program, dynamic=True)
    with torch.no_grad():
        for rows in (x[:5], x):
            torch.testing.assert_close(compiled(rows), program(rows), rtol=1e-5, atol=1e-6)
