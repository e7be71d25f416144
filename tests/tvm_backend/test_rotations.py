"""Rotations that are computed while a network runs: one kernel each, which rounds what it has rotated."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import tvm_backend
from cat_plugin.graph.export import export_program
from cat_plugin.ptq import QuantSpec, quantize


class _FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(24), nn.Linear(24, 96), nn.Linear(96, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((x + self.down(F.gelu(self.up(self.norm(x))))).mean(1))


def test_a_rotation_is_one_kernel_that_gives_integers(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(16, 7, 24)
    module, _ = quantize(
        _FeedForward().eval(), QuantSpec(w_bits=8, a_bits=8, preset="fast", rotation="online"), x
    )
    report = tvm_backend.compile(export_program(module, x[:2]), out=tmp_path / "model.so")
    (rotation,) = [kernel for kernel in report.kernels if kernel.kind == "rotation"]
    assert rotation.output == (96,)
    assert rotation.bytes == 96 * 5  # float32 in, bytes out
    found = np.asarray(tvm_backend.load(tmp_path / "model.so")(x.numpy()))
    expected = module(x).detach().numpy()
    # A value half way between two integers of a grid may fall to either side.
    assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max()
