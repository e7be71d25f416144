"""The benchmark of other people's architectures: what it measures, on networks of our own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import architectures
from benchmarks.architecture_models import SOURCES, Network, _awake, _images, _shrunk


def _network() -> Network:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    shape = (3, 12, 12)
    return Network(
        _awake(model.eval(), _images(32, shape, 3)),
        [_images(16, shape, 1), _images(16, shape, 4)],
        _images(12, shape, 2),
    )


def test_a_network_comes_through_and_its_library_errs_as_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tvm")
    monkeypatch.setitem(SOURCES, "ours", (lambda: ["net"], lambda _: _network()))
    architectures.measure("ours", "net", tmp_path / "row.json")
    row = json.loads((tmp_path / "row.json").read_text())
    assert "reason" not in row
    assert 0 < row["naive"] < 1
    assert 0 < row["error"] < 1
    assert row["library"] == pytest.approx(row["error"], abs=2e-3)
    assert row["apart"] < row["error"] / 10


def test_what_was_measured_before_a_failure_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) if float(x.sum()) < 1e9 else x

    network = Network(Untraceable().eval(), [torch.randn(16, 3)], torch.randn(12, 3))
    monkeypatch.setitem(SOURCES, "ours", (lambda: ["net"], lambda _: network))
    architectures.measure("ours", "net", tmp_path / "row.json")
    row = json.loads((tmp_path / "row.json").read_text())
    assert row["naive"] > 0
    assert row["reason"]
    assert "error" not in row


def test_naive_rounding_is_that_of_eight_bits() -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 0.5)
    inputs = torch.linspace(-1, 2, 16).reshape(16, 1)
    rounded = architectures._rounded(Network(layer, [inputs], inputs))
    steps = (rounded(inputs) + 0.5) / (0.5 * 3 / 255)
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    assert float((rounded(inputs) - layer(inputs)).detach().abs().max()) <= 0.5 * 1.5 / 255 + 1e-6


def test_a_configuration_shrinks_to_two_layers_whose_sizes_fit() -> None:
    given = {
        "hidden_size": 4096, "num_hidden_layers": 32, "depths": [3, 3, 9, 3], "hidden_sizes": [96, 192, 384, 768],
        "num_heads": [3, 6, 12, 24], "rope_theta": 1e6, "hidden_act": "silu", "vision_config": {"image_size": 224, "patch_size": 14},
    }  # fmt: skip
    assert _shrunk("any", given) == {
        "hidden_size": 64, "num_hidden_layers": 2, "depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 64, 128],
        "num_heads": [1, 2, 4, 8], "vision_config": {"image_size": 64, "patch_size": 8},
    }  # fmt: skip


def test_no_branch_is_switched_off() -> None:
    norm = nn.BatchNorm2d(4)
    nn.init.zeros_(norm.weight)
    x = 3 + 2 * torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    _awake(norm, x)
    assert float(norm.weight.min()) > 0.3
    assert norm.running_mean is not None
    assert float(norm.running_mean.mean()) == pytest.approx(3, rel=0.02)
