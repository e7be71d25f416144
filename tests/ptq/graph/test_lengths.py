"""Quantized models of tokens take shorter sequences than they were calibrated on, where the model itself does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cat_plugin
from cat_plugin.graph.export import export_program
from cat_plugin.graph.inspect import signature
from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.graph.lengths import follow_length
from cat_plugin.ptq.graph.trace import trace
from cat_plugin.ptq.rows import Inputs
from tests.zoo import ZOO


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"weight_only": True, "weight_groups": 8}),
        ("llama", {"a_granularity": "token", "rotation": "online"}),
        ("encoder", {"smoothing": "searched", "attention_bits": 4}),
        ("text-cnn", {}),
    ],
)
def test_a_quantized_model_takes_shorter_sequences(name, options):
    network = ZOO[name]
    model, x = network.build(), network.inputs(12)
    module, _ = quantize(model, QuantSpec(w_bits=8, a_bits=8, preset="fast", **options), x)
    program = export_program(module, x[:2])
    any_length = name != "text-cnn"  # whose pooling over the whole sequence wants a number in torch.export
    assert signature(program)["inputs"][0]["shape"] == ["N", "T" if any_length else x.shape[1]]
    with torch.no_grad():
        for length in (x.shape[1], 9, 5):
            expected = model(x[:, :length])
            found = module(x[:, :length])
            assert float((found - expected).norm() / expected.norm()) < 0.12
            if any_length:
                torch.testing.assert_close(program.module()(x[:4, :length]), found[:4], rtol=1e-4, atol=1e-5)
        if name == "llama":  # what comes behind changes nothing
            torch.testing.assert_close(module(x[:, :7]), module(x)[:, :7], rtol=1e-4, atol=1e-5)


class _Embedded(nn.Module):
    """Token numbers through a table and what is to be tested: (N, T, 8)."""

    def __init__(self, positions: torch.Tensor | None = None, head: nn.Module | None = None) -> None:
        super().__init__()
        self.table, self.layer, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), head
        if positions is not None:
            self.register_buffer("positions", positions)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        if hasattr(self, "positions"):
            x = x + self.positions[-ids.shape[1] :]
        x = self.layer(x)
        return x if self.head is None else self.head(x)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (_Embedded(torch.randn(12, 8)), "has other values at 7 tokens|has arguments"),
        (_Embedded(head=nn.Sequential(nn.Flatten(), nn.Linear(96, 8))), "cannot be traced"),
    ],
)
def test_what_does_not_follow_keeps_its_length(model, reason):
    ids = torch.randint(20, (4, 12))
    model.eval()
    inputs = Inputs.of(ids)
    module = trace(model, inputs)
    found = follow_length(module, model, inputs, lambda other: trace(model, other))
    assert found is None or any(each in found for each in reason.split("|"))
    quantized, _ = quantize(model, QuantSpec(preset="fast"), ids)
    with torch.no_grad():
        if found is None:
            assert float((quantized(ids[:, :5]) - model(ids[:, :5])).abs().max()) < 0.1
        else:
            with pytest.raises(RuntimeError):
                quantized(ids[:, :5])


class _Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.q, self.kv = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        n, tokens = ids.shape
        x = self.table(ids)
        q = self.q(x).view(n, tokens, 4, 4).transpose(1, 2)
        k, v = self.kv(x).view(n, tokens, 2, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).reshape(n, tokens, 16)


def test_causal_and_grouped_attention_is_written_as_onnx_for_any_length(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model, ids = _Grouped().eval(), torch.randint(20, (3, 10))
    path = cat_plugin.export_onnx(model, tmp_path / "model.onnx", ids)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for length in (10, 4):
        found = session.run(None, {session.get_inputs()[0].name: ids[:, :length].numpy()})[0]
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(ids[:, :length]), rtol=1e-4, atol=1e-5)
