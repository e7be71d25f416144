"""Rotation vectors: one at first, nothing but scales at rank one, part of the grid that integers are fitted to beyond."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.closed_form.compensation import fit_integers
from cat_plugin.ptq.closed_form.moments import Moments
from cat_plugin.ptq.graph.modules import QuantOp, modulation
from cat_plugin.ptq.transforms.smoothing.fake import clipped_weight
from cat_plugin.ptq.transforms.smoothing.vectors import first_vectors
from tests.zoo import ZOO


def _seeded(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_the_product_is_one_at_first_and_every_rank_has_a_gradient_of_its_own():
    left, right = first_vectors(torch.Size((6, 10)), 3, torch.device("cpu"))
    assert torch.equal(modulation(left, right), torch.ones(6, 10))
    (modulation(left, right) * _seeded(6, 10)).sum().backward()
    columns = left.grad.T
    assert torch.linalg.matrix_rank(columns) == 3


def test_of_rank_one_they_are_the_scales_of_rows_and_channels():
    weight, share = _seeded(5, 12), torch.full((5, 1), 4.0)
    rows, columns = _seeded(5, 1).exp(), _seeded(1, 12).exp()
    found = clipped_weight(weight, share, share, 3, rows @ columns)
    scaled = clipped_weight(weight / columns, share, share, 3) * columns
    torch.testing.assert_close(found, scaled, rtol=1e-5, atol=1e-6)


def test_integers_are_fitted_to_the_modulated_grid():
    x = _seeded(400, 16).double() @ torch.randn(
        16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    h = (x.T @ x / len(x)).unsqueeze(0)
    moments = Moments(h, torch.zeros(1, 16, 8), torch.zeros(1, 16), torch.zeros(1, 8), 400)
    weight = _seeded(1, 8, 16).double()
    factor = 1 + 0.4 * torch.sign(_seeded(1, 8, 16))
    scale, zero = torch.full((1, 8), 0.5), torch.zeros(1, 8, dtype=torch.int64)
    integers, found = fit_integers(weight, moments, scale, zero, (-4, 3), modulation=factor)

    def loss(values: torch.Tensor) -> float:
        error = values.double() - weight
        return float((error @ h[0] * error).sum())

    fitted = integers * found.unsqueeze(2) * factor
    nearest = (weight / (found.unsqueeze(2) * factor)).round().clamp(-4, 3) * found.unsqueeze(2) * factor
    assert loss(fitted) < 0.7 * loss(nearest)
    alike = fit_integers(weight, moments, scale, zero, (-4, 3), modulation=torch.ones_like(factor))
    plain = fit_integers(weight, moments, scale, zero, (-4, 3))
    assert all(torch.equal(a, b) for a, b in zip(alike, plain, strict=True))


def test_a_layer_computes_with_them():
    vectors = _seeded(4, 2).abs(), _seeded(2, 6).abs()
    layer = QuantOp("layer", torch.ops.aten.linear.default, _seeded(4, 6), None, (), 4, 4, None, vectors)
    layer.scale = torch.full((4,), 0.2)
    layer.q_weight = layer.round_to_nearest()
    steps = 0.2 * np.maximum(vectors[0].numpy() @ vectors[1].numpy(), 1e-2)
    integers = np.clip(np.round(layer.weight.numpy() / steps), -8, 7)
    np.testing.assert_allclose(layer.dequantized(), integers * steps, rtol=1e-5)


@pytest.fixture(scope="module")
def network():
    found = ZOO["vit"]
    return found.build(), found.inputs(32)


def _quantized(network, **options):
    model, inputs = network
    spec = QuantSpec(
        w_bits=3, a_bits=8, preset="fast", smoothing="lrquant", first_bits=None, last_bits=None, **options
    )
    return quantize(model, spec, inputs)[0], inputs


def test_they_are_trained_and_handed_over(network):
    module, inputs = _quantized(network, smoothing_epochs=4, rotation_vectors=2)
    kept = [name for name, _ in module.named_buffers() if name.endswith("weight_left")]
    assert kept
    assert module(inputs).isfinite().all()
    plain, _ = _quantized(network, smoothing_epochs=4)
    assert not torch.equal(plain(inputs), module(inputs))


def test_untrained_they_are_not_there(network):
    module, inputs = _quantized(network, rotation_vectors=2)
    plain, _ = _quantized(network)
    assert not [name for name, _ in module.named_buffers() if name.endswith("weight_left")]
    assert torch.equal(plain(inputs), module(inputs))
