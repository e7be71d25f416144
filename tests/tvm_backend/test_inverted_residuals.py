"""A small MobileNetV2: what is peculiar to it, for any batch size and for batch sizes with code of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import tvm_backend
from tests.tvm_backend import qdq_models as models

BITS = 4


class InvertedResidual(nn.Module):
    """Expansion and depthwise convolution with ReLU6, projection without; a shortcut where the shape stays."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        wide = 3 * cin
        self.expand = models.QConv(nn.Conv2d(cin, wide, 1), BITS)
        padding = 1 if stride == 1 else 0
        self.depthwise = models.QConv(nn.Conv2d(wide, wide, 3, stride, padding, groups=wide), BITS)
        self.project = models.QConv(nn.Conv2d(wide, cout, 1), BITS)
        self.q_in, self.q_wide, self.q_narrow = (
            models.Quantize(BITS, signed) for signed in (True, False, False)
        )
        self.q_branch, self.q_skip = models.Quantize(8, True), models.Quantize(8, True)
        self.stride, self.shortcut = stride, stride == 1 and cin == cout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.relu6(self.expand(self.q_in(x)))
        y = self.q_wide(y)
        if self.stride == 2:
            y = nn.functional.pad(y, (0, 1, 0, 1))
        y = self.project(self.q_narrow(nn.functional.relu6(self.depthwise(y))))
        return self.q_branch(y) + self.q_skip(x) if self.shortcut else y


class MobileNet(nn.Module):
    """Stem with stride 2 padded right and below, one block with a shortcut, one with stride 2, mean, linear layer."""

    def __init__(self, narrow: int = 8, wide: int = 12) -> None:
        super().__init__()
        self.q_image, self.q_pool, self.q_row = (
            models.Quantize(8, True),
            models.Quantize(8),
            models.Quantize(8),
        )
        self.stem = models.QConv(nn.Conv2d(3, narrow, 3, 2), 8)
        self.blocks = nn.Sequential(InvertedResidual(narrow, narrow, 1), InvertedResidual(narrow, wide, 2))
        self.fc = models.QLinear(nn.Linear(wide, 7), 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(nn.functional.pad(self.q_image(x), (0, 1, 0, 1)))
        x = self.blocks(nn.functional.relu6(x))
        return self.fc(self.q_row(self.q_pool(x).mean((2, 3))))


@pytest.fixture(scope="module")
def mobile(tmp_path_factory):
    torch.manual_seed(4)
    model, x = MobileNet(), 2 * torch.randn(5, 3, 24, 24)
    models.calibrated(model, x)
    # The memory for the largest batch that the export admits could not be had.
    batch = torch.export.Dim("batch", min=1, max=1 << 32)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    out = tmp_path_factory.mktemp("mobile") / "model.so"
    return tvm_backend.compile(program, out=out, batch_sizes=(1, 3), cache=False), model, x


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_equals_torch_for_every_batch(mobile, batch):
    report, model, x = mobile
    actual = tvm_backend.load(report.path)(x[:batch]).numpy()
    wanted = model(x[:batch]).detach().numpy()
    # One output step of the last quantizer, where torch's rounded sums lie on the other side of an edge.
    step = float(model.q_row.scale * (model.fc.weight.q.abs().float() * model.fc.weight.scale[:, None]).max())
    assert np.abs(actual - wanted).max() <= step + 1e-5
    assert np.median(np.abs(actual - wanted)) < 1e-5


def test_runs_in_integers(mobile):
    report, _, _ = mobile
    assert report.float_ops == ()
    convolutions = [kernel.output for kernel in report.kernels if kernel.kind == "conv"]
    assert convolutions == [
        (12, 12, 8), (12, 12, 24), (12, 12, 24), (12, 12, 8), (12, 12, 24), (6, 6, 24), (6, 6, 12),
    ]  # fmt: skip
