"""Operations that are written as ONNX in terms of others: ONNX Runtime gives what the module gives, at any batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cat_plugin
from tests.zoo.rewritten import REWRITTEN

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from cat_plugin.graph.onnx.sessions import session_of


def _pooled(x: Tensor) -> tuple[Tensor, ...]:
    values, places = F.max_pool2d(x, 2, return_indices=True)
    return (
        F.max_unpool2d(values, places, 2),
        F.max_pool2d(x, 3, 2, 1, return_indices=True)[1],
        F.avg_pool2d(x, 3, 2, 1, divisor_override=5),
        F.avg_pool2d(x, 2, divisor_override=3, count_include_pad=False),
    )


WRITTEN = {**REWRITTEN, "pooled": _pooled}


class _Of(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return WRITTEN[self.name](x)


@pytest.mark.parametrize("name", WRITTEN)
def test_written_as_others_and_computes_the_same(name: str, tmp_path: Path) -> None:
    x = torch.randn(5, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    module = _Of(name).eval()
    session = session_of(str(cat_plugin.export_onnx(module, tmp_path / "model.onnx", x[:2])))
    for rows in (1, 5):
        results = session.run(None, {session.get_inputs()[0].name: x[:rows].numpy()})
        for found, expected in zip(results, module(x[:rows]), strict=True):
            assert found.shape == tuple(expected.shape)
            assert torch.allclose(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
