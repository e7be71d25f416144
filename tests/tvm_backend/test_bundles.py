"""From a corrected module to a bundle to a library, for every mode of the estimator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import cat_plugin
import tvm_backend
from cat_plugin.cluster_affine import ClusterAffine
from cat_plugin.correction import CorrectedModule
from cat_plugin.graph.bundle import read_bundle
from cat_plugin.graph.module import ClusterAffineModule
from tests.cluster_affine.reference import random_parameters
from tests.tvm_backend import qdq_models as models

CLASSES = 10


class Net(nn.Module):
    """A 2-bit convolution, the mean over its pixels and a 4-bit linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q1, self.q2, self.q3 = models.Quantize(8, True), models.Quantize(8), models.Quantize(8)
        self.conv = models.QConv(nn.Conv2d(4, 16, 3, 1, 1), 2)
        self.fc = models.QLinear(nn.Linear(16, CLASSES), 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.q2(torch.relu(self.conv(self.q1(x))))
        return self.fc(self.q3(x.mean((2, 3))))


@pytest.fixture(scope="module")
def quantized():
    torch.manual_seed(2)
    x = torch.randn(24, 4, 6, 6)
    return models.calibrated(Net(), x), x


def library_of(corrected, x, folder):
    bundle = cat_plugin.export_bundle(corrected, x[:2], folder / "bundle")
    report = tvm_backend.compile(bundle, out=folder / "model.so", cache=False)
    return report, tvm_backend.load(report.path)


@pytest.mark.parametrize("components", [0, 4])
@pytest.mark.parametrize("mode", ["diagonal", "lowrank", "full"])
def test_every_mode_agrees_with_torch(mode, components, quantized, tmp_path):
    model, x = quantized
    parameters = random_parameters(
        mode, np.random.default_rng(7), classes=CLASSES, clusters=6, components=components
    )
    corrected = CorrectedModule(model, ClusterAffineModule(parameters))
    report, library = library_of(corrected, x, tmp_path)
    with torch.no_grad():
        wanted = corrected(x).numpy()
        uncorrected = model(x).numpy()
    error = np.abs(library(x.numpy()) - wanted).max(1)
    # Rows in which the sums of torch and the exact ones lie on two sides of a rounding edge differ by a step.
    assert np.median(error) < 2e-5 * np.abs(wanted).max()
    assert error.max() < 0.05 * np.abs(wanted).max()
    assert np.abs(wanted - uncorrected).max() > 0.1 * np.abs(wanted).max()
    names = {"diagonal": "cluster_affine", "lowrank": "cluster_affine_lowrank", "full": "cluster_affine_full"}
    assert report.kernels[-1].kind == names[mode]
    assert report.float_ops == ()


def test_what_correct_returned_is_compiled(quantized, tmp_path):
    model, x = quantized

    class Sharper(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 1.5 * model(x) + 0.1

    estimator = ClusterAffine(mode="diagonal", n_clusters=2, alpha=1.0, random_state=0)
    corrected = cat_plugin.correct(model, Sharper(), [x[:12], x[12:]], estimator)
    _, library = library_of(read_program(corrected, x, tmp_path), x, tmp_path)
    with torch.no_grad():
        wanted = corrected(x)
    error = (library(x) - wanted).abs().amax(1)
    assert error.median() < 1e-5
    torch.testing.assert_close(wanted, Sharper()(x).detach(), atol=0.05, rtol=0)


def read_program(corrected, x, folder):
    """The module by way of a bundle of its own, opened and read."""
    return read_bundle(cat_plugin.export_bundle(corrected, x[:2], folder / "first")).program()


def test_the_report_says_where_weights_are_unpacked(quantized, tmp_path):
    model, x = quantized
    report = tvm_backend.compile(models.exported(model, x), out=tmp_path / "m.so", cache=False)
    found = {kernel.kind: (kernel.weight_bits, kernel.unpacking) for kernel in report.kernels}
    assert found["conv"] == (2, "once a call")
    assert found["linear"] == (4, "in registers")
    assert found["quantize"] == (0, "")
    assert "2-bit weights unpacked once a call" in str(report)
    assert "4-bit weights unpacked in registers" in str(report)
