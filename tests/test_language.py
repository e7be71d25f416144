"""Perplexity against its formula in double precision, and its refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cat_plugin import perplexity
from cat_plugin.errors import CATValueError
from cat_plugin.ptq import QuantSpec, quantize
from tests.zoo import ZOO


def test_it_is_the_exponential_of_the_mean_loss():
    network = ZOO["llama"]
    model, ids = network.build(), network.inputs(6)
    with torch.no_grad():
        z = model(ids).double().numpy()[:, :-1]
    z = z - z.max(-1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_p, ids.numpy()[:, 1:, None], -1)
    expected = float(np.exp(-chosen.mean()))
    assert perplexity(model, ids) == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, [ids[:4], ids[4:]]) == pytest.approx(expected, rel=1e-5)


def test_a_quantized_model_is_scored_the_same_way():
    network = ZOO["llama"]
    model, ids = network.build(), network.inputs(16)
    quantized, _ = quantize(model, QuantSpec(w_bits=8, a_bits=8, preset="fast", num_samples=16), ids)
    assert perplexity(quantized, ids) == pytest.approx(perplexity(model, ids), rel=0.02)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (torch.zeros(2, 1, dtype=torch.long), r"shape \(1, 1\).*T of 2 or more"),
        (torch.zeros(2, 5), "torch.float32"),
        ([], "no windows"),
        (torch.zeros(2, 12, dtype=torch.long), r"gives \(1, 10\) for tokens"),
    ],
)
def test_what_cannot_be_scored_is_refused(windows, message):
    with pytest.raises(CATValueError, match=message):
        perplexity(ZOO["encoder"].build(), windows)
    with pytest.raises(CATValueError, match="gives str"):
        perplexity(_Words(), torch.zeros(1, 3, dtype=torch.long))


class _Words(nn.Module):
    def forward(self, x):
        return "words"
