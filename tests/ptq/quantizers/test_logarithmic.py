"""The logarithmic grid against its definition in float64, and what is written of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.quantizers.logarithmic import LogQuantizer, search_levels
from tests.zoo import ZOO


def _shares(seed: int = 0, count: int = 400) -> torch.Tensor:
    return torch.softmax(3 * torch.randn(count, 20, generator=torch.Generator().manual_seed(seed)), 1)


@pytest.mark.parametrize(("bits", "step"), [(2, 8), (4, 16), (4, 8), (8, 2)])
def test_values_go_to_the_nearest_level(bits, step):
    quantizer = LogQuantizer(bits)
    quantizer.set_range(0.9, step, False)
    levels = [0.0] + [float(np.float32(0.9)) * 2.0 ** (-step / 16 * k) for k in range(2**bits - 2, -1, -1)]
    np.testing.assert_allclose(quantizer.levels.numpy(), levels, rtol=1e-6)
    x = _shares().flatten()
    expected = np.abs(x.double().numpy()[:, None] - np.array(levels)).min(1)
    found = np.abs(quantizer(x).double().numpy() - x.double().numpy())
    np.testing.assert_allclose(found, expected, atol=1e-7)
    assert len(quantizer(x).unique()) <= 2**bits


def test_the_searched_base_errs_less_than_two_and_its_root():
    x = _shares().flatten()
    quantizer = LogQuantizer(4)

    def error(scale, step):
        quantizer.set_range(scale, step, False)
        return float((quantizer(x) - x).square().mean())

    found, step, signed = search_levels(x, 4)
    assert not signed
    assert error(found, step) <= min(error(float(x.max()), 16), error(float(x.max()), 8))


def test_gradients_pass():
    quantizer = LogQuantizer(4)
    quantizer.set_range(1.0, 8, False)
    x = _shares().requires_grad_()
    (gradient,) = torch.autograd.grad((quantizer(x) * 3).sum(), x)
    assert torch.equal(gradient, torch.full_like(x, 3.0))


def test_a_network_whose_softmax_is_on_that_grid_is_written_with_its_levels():
    network = ZOO["vit"]
    model, x = network.build(), network.inputs(16)
    spec = QuantSpec(
        w_bits=8, a_bits=8, attention_bits=4, softmax_grid="logarithmic", preset="fast", num_samples=16
    )
    module, report = quantize(model, spec, x)
    assert not report.unquantized
    tables = [buffer for name, buffer in module.named_buffers() if name.endswith("levels")]
    assert len(tables) == 2
    for table in tables:
        ratios = table[2:] / table[1:-1]
        torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-5, atol=0)
