"""Attention written out: the same function, with or without masks, and a scale for each head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.graph.trace import trace
from cat_plugin.ptq.rows import Rows
from cat_plugin.ptq.transforms.attention import AttentionHeads
from tests.ptq.models import randomise, small_inputs


class _Heads(nn.Module):
    """Two heads, one of which is a hundred times as wide."""

    def __init__(self, mask: torch.Tensor | None = None, scale: float | None = None):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.register_buffer("mask", mask)
        self.scale = scale

    def forward(self, x):
        q, k, v = (f(x).view(-1, 5, 2, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, scale=self.scale)
        return self.out(y.transpose(1, 2).reshape(-1, 5, 8)).mean(1)


_SHOWN = torch.tensor(
    [[1, 1, 0, 1, 0], [0, 1, 1, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
).bool()


@pytest.mark.parametrize("mask", [None, _SHOWN, torch.where(_SHOWN, 0.5, -3.0)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_it_computes_the_same_written_out(mask, scale):
    model, x = randomise(_Heads(mask, scale)), small_inputs(12, 5, 8)
    module = trace(model, x[:2])
    spec = QuantSpec(attention_bits=4, batch_size=4)
    assert AttentionHeads().applies(module, spec)
    AttentionHeads().fold(module, Rows([x]), spec, torch.Generator())
    assert not any("scaled_dot" in str(n.target) for n in module.graph.nodes if n.op == "call_function")
    with torch.no_grad():
        torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-5)


def test_heads_of_different_range_share_no_grid():
    model, x = randomise(_Heads()), small_inputs(64, 5, 8)
    with torch.no_grad():
        for layer in (model.q, model.k):
            layer.weight[:4] *= 10
            layer.bias[:4] *= 10
    spec = QuantSpec(attention_bits=4, batch_size=64)
    module = trace(model, x[:2])
    AttentionHeads().fold(module, Rows([x]), spec, torch.Generator())
    factors = [
        b.flatten() for name, b in module.named_buffers() if "_query_factor" in name or "_key_factor" in name
    ]
    assert len(factors) == 2
    assert all(3 < float(factor[1] / factor[0]) < 30 for factor in factors)


def test_without_bits_attention_stays_as_it_is():
    model, x = randomise(_Heads()), small_inputs(16, 5, 8)
    module, report = quantize(model, QuantSpec(w_bits=8, a_bits=8, attention_bits=None, preset="fast"), x)
    assert any("scaled_dot" in str(node.target) for node in module.graph.nodes)
    assert any("scaled_dot" in entry for entry in report.unquantized)


@pytest.mark.parametrize("mask", [None, _SHOWN])
def test_what_all_keys_have_in_common_takes_no_range(mask):
    model, x = randomise(_Heads(mask)), small_inputs(64, 5, 8)
    plain = trace(model, x[:2])
    with torch.no_grad():
        model.k.bias += 100
    shifted = trace(model, x[:2])
    for module in (plain, shifted):
        spec = QuantSpec(attention_bits=4, batch_size=64)
        AttentionHeads().fold(module, Rows([x]), spec, torch.Generator().manual_seed(0))
    factors = [b for m in (plain, shifted) for name, b in m.named_buffers() if name.startswith("_key_factor")]
    torch.testing.assert_close(*factors, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(shifted(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_wide_channel_of_queries_and_keys_is_spread_over_its_head():
    model, x = randomise(_Heads()), small_inputs(64, 5, 8)
    with torch.no_grad():
        model.q.weight[1] *= 30
    module = trace(model, x[:2])
    before = model.q(x).std((0, 1))[:4]
    AttentionHeads().fold(module, Rows([x]), QuantSpec(attention_bits=4, batch_size=64), torch.Generator())
    layer = next(n for n in module.graph.nodes if n.name == "linear")
    after = (x @ module.get_buffer(str(layer.args[1].target)).T).std((0, 1))[:4]
    assert before.max() > 8 * before.min()
    assert after.max() < 1.5 * after.min()


def test_keys_that_are_queries_keep_their_mean():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            k, v = (f(x).view(-1, 5, 2, 4).transpose(1, 2) for f in (self.k, self.v))
            return F.scaled_dot_product_attention(k, k, v).mean((1, 2))

    model, x = randomise(Shared()), small_inputs(64, 5, 8)
    with torch.no_grad():
        model.k.bias += 1
    module = trace(model, x[:2])
    AttentionHeads().fold(module, Rows([x]), QuantSpec(attention_bits=4, batch_size=64), torch.Generator())
    with torch.no_grad():
        torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-4)
