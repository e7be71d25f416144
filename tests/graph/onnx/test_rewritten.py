"""Operations that are written as ONNX in terms of others: ONNX Runtime gives what the module gives, at any batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import cat_plugin
from tests.zoo.rewritten import REWRITTEN

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from cat_plugin.graph.onnx.sessions import session_of


class _Of(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return REWRITTEN[self.name](x)


@pytest.mark.parametrize("name", REWRITTEN)
def test_written_as_others_and_computes_the_same(name: str, tmp_path: Path) -> None:
    x = torch.randn(5, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    module = _Of(name).eval()
    session = session_of(str(cat_plugin.export_onnx(module, tmp_path / "model.onnx", x[:2])))
    for rows in (1, 5):
        results = session.run(None, {session.get_inputs()[0].name: x[:rows].numpy()})
        for found, expected in zip(results, module(x[:rows]), strict=True):
            assert found.shape == tuple(expected.shape)
            assert torch.allclose(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
