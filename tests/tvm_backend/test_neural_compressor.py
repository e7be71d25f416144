"""What Neural Compressor's own static int8 hands out, with the cluster-affine step on top, goes through the compiler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from neural_compressor.torch import quantization

if not hasattr(quantization, "INT8StaticQuantConfig"):
    pytest.skip("this Neural Compressor has no static int8 by pt2e", allow_module_level=True)

from torch import nn

import cat_plugin
import tvm_backend
from cat_plugin.cluster_affine import ClusterAffine


@pytest.fixture(scope="module")
def corrected():
    """A small network by the host's default configuration, corrected; and its images."""
    from neural_compressor.torch.export import export

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.ReLU(),
        nn.Conv2d(16, 32, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 8),
    ).eval()  # fmt: skip
    images = torch.randn(64, 3, 12, 12)
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    graph = export(model, example_inputs=(images[:2],), dynamic_shapes=shapes)
    prepared = quantization.prepare(graph, quantization.INT8StaticQuantConfig(), example_inputs=(images[:2],))
    with torch.no_grad():
        prepared(images)
        quantized = quantization.convert(prepared)
        step = ClusterAffine(mode="diagonal", n_clusters=4, random_state=0)
        return cat_plugin.correct(quantized, model, [images[:32], images[32:]], step), images


def test_static_int8_with_a_correction(corrected, tmp_path):
    module, images = corrected
    bundle = cat_plugin.export_bundle(module, images[:2], tmp_path / "bundle")
    report = tvm_backend.compile(bundle, out=tmp_path / "model.so", cache=False)
    kinds = [kernel.kind for kernel in report.kernels]
    assert kinds.count("conv") == 3
    assert kinds.count("linear") == 1
    assert kinds[-1] == "cluster_affine"
    library = tvm_backend.load(report.path)
    for batch in (1, 5, 64):
        with torch.no_grad():
            wanted = module(images[:batch]).numpy()
        error = np.abs(library(images[:batch].numpy()) - wanted).max(1)
        # Rows whose sums lie on two sides of a rounding edge in torch's float and in exact integers differ by a step.
        assert np.median(error) < 2e-5 * np.abs(wanted).max()
        assert error.max() < 0.05 * np.abs(wanted).max()
