"""Grids of single tokens: the formula in double precision, and the QDQ graph to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.quantizers.observers import search_token_share
from cat_plugin.ptq.quantizers.per_token import TokenQuantizer
from tests.ptq.models import small_inputs


def _tokens() -> torch.Tensor:
    """(5, 7, 12): tokens of very different size, one of them zero, one without negative values."""
    x = small_inputs(5, 7, 12, seed=3) * torch.logspace(-3, 3, 7).reshape(1, 7, 1)
    x[0, 0] = 0.0
    x[1, 1] = x[1, 1].abs() + 1.0
    return x


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("share", [1.0, 0.8])
def test_rounding_is_that_of_the_formula_in_double_precision(bits, share):
    quantizer, x = TokenQuantizer(bits), _tokens()
    assert torch.equal(quantizer(x), x)  # before calibration
    quantizer.set_range(share)
    found, wide = quantizer(x).numpy(), x.double().numpy()
    low = share * np.minimum(wide.min(-1, keepdims=True), 0)
    high = share * np.maximum(wide.max(-1, keepdims=True), 0)
    top = 2**bits - 1
    scale = np.maximum((high - low) / top, 1e-8)
    zero = np.round(-low / scale)
    expected = (np.clip(np.round(wide / scale + zero), 0, top) - zero) * scale
    apart = np.abs(found - expected) > 1e-5 * np.maximum(scale, np.abs(expected))
    assert apart.mean() < 0.01  # a value half way between two integers may fall to either side
    assert np.all(np.abs(found - expected) <= 1.001 * scale)
    if share == 1.0:
        assert np.all(np.abs(found - wide) <= 1.01 * scale)


def test_a_token_does_not_suffer_from_anothers_outlier():
    x = small_inputs(1, 2, 16, seed=5)
    quantizer = TokenQuantizer(4)
    quantizer.set_range(1.0)
    alone = quantizer(x)[:, :1]
    x[0, 1, 3] = 1e6
    assert torch.equal(quantizer(x)[:, :1], alone)


def test_the_share_of_least_error_clips_at_4_bits_and_hardly_at_8():
    tokens = small_inputs(512, 256, seed=7)
    shares = {}
    for bits in (4, 8):
        quantizer = TokenQuantizer(bits)
        shares[bits] = search_token_share(tokens, quantizer)
        error = [float((quantizer.rounded(tokens, s) - tokens).square().mean()) for s in (shares[bits], 1.0)]
        assert error[0] <= error[1]
    assert shares[4] < 0.97
    assert shares[8] > 0.9


@pytest.mark.parametrize("bits", [4, 8])
def test_the_graph_computes_what_the_quantizer_does(bits):
    torch.manual_seed(0)
    layer = nn.Linear(12, 6)
    x = _tokens()
    spec = QuantSpec(a_bits=bits, preset="fast", first_bits=None, last_bits=None, a_granularity="token")
    module, report = quantize(nn.Sequential(layer), spec, x)
    nodes = {str(node.target): node for node in module.graph.nodes if node.op == "call_function"}
    assert "quantized_decomposed.quantize_per_token.default" in nodes
    share = next(float(n.args[1]) for n in module.graph.nodes if str(n.target) == "aten.mul.Tensor")
    quantizer = TokenQuantizer(bits)
    quantizer.set_range(share)
    parts = dict(module.named_buffers())
    weight = (parts["0.weight"].float() - parts["0.weight_zero_point"][:, None]) * parts["0.weight_scale"][
        :, None
    ]
    expected = torch.nn.functional.linear(quantizer(x), weight, parts["0.bias"])
    assert torch.equal(module(x), expected)
    assert [layer.a_bits for layer in report.layers] == [bits]


def test_gradients_pass_the_rounding_and_reach_the_share():
    x = _tokens()[:, 2:5].clone().requires_grad_()
    share = torch.tensor(0.8, requires_grad=True)
    TokenQuantizer(4).rounded(x, share).square().sum().backward()
    assert float(share.grad.abs()) > 0
    assert bool((x.grad != 0).any())
