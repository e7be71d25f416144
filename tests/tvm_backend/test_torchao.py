"""What torchao's own PT2E flow quantized is corrected, bundled and compiled like anything else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import cat_plugin
import tvm_backend
from cat_plugin.cluster_affine import ClusterAffine

pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")


class Residual(nn.Module):
    """A convolution, one that adds its input, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = (self.conv(x) + x).relu()
        return self.head(x.mean((2, 3)))


def test_a_network_quantized_by_torchao_is_corrected_and_compiled(tmp_path) -> None:
    torch.manual_seed(0)
    network, images = Residual().eval(), torch.randn(64, 3, 8, 8)
    batch = ({0: torch.export.Dim("batch", min=1)},)
    graph = torch.export.export(network, (images[:2],), dynamic_shapes=batch).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = pt2e.prepare_pt2e(graph, quantizer)
    with torch.no_grad():
        prepared(images)
        quantized = pt2e.convert_pt2e(prepared)
        step = ClusterAffine(mode="diagonal", n_clusters=2, random_state=0)
        corrected = cat_plugin.correct(quantized, network, images.split(16), step)
        wanted = corrected(images).numpy()
        full, before = network(images).numpy(), quantized(images).numpy()
    assert np.square(wanted - full).mean() < 0.8 * np.square(before - full).mean()
    bundle = cat_plugin.export_bundle(corrected, images[:2], tmp_path / "bundle")
    report = tvm_backend.compile(bundle, out=tmp_path / "model.so", cache=False)
    kinds = [kernel.kind for kernel in report.kernels]
    assert kinds.count("conv") == 2
    assert kinds.count("linear") == 1
    library = tvm_backend.load(report.path)
    for rows in (1, 5, 64):
        error = np.abs(library(images[:rows].numpy()) - wanted[:rows])
        assert np.median(error) < 2e-5 * np.abs(wanted).max()
        assert error.max() < 0.05 * np.abs(wanted).max()
