"""Matrices in front of linear layers: what they are kept to, and that graphs compute the same with them."""

from __future__ import annotations

import pytest
import torch

from cat_plugin.equivalence import Equivalence
from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.graph.ops import is_call, operand
from cat_plugin.ptq.graph.trace import trace
from cat_plugin.ptq.transforms.smoothing.matrices import MATRICES, Affine
from tests.zoo import ZOO

_CPU = torch.device("cpu")


def _disturbed(name, width):
    matrix = MATRICES[name](width, _CPU)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in matrix.trained:
            part += 0.3 * torch.randn(part.shape, generator=generator)
    return matrix


@pytest.mark.parametrize("name", MATRICES)
def test_values_and_weight_together_are_what_they_were(name):
    matrix = _disturbed(name, 24)
    x, weight = torch.randn(5, 3, 24), torch.randn(7, 24)
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(matrix(x) @ matrix.on_weight(weight).T, expected.float(), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(matrix(x), x)


def test_the_whole_matrix_is_diagonally_dominant_and_grows_from_the_diagonal():
    matrix = Affine(16, _CPU)
    with torch.no_grad():
        matrix.trained[0] += 5.0
    (whole,) = matrix.parts()
    rest = whole.abs().sum(1) - whole.diagonal().abs()
    assert bool((rest < whole.diagonal()).all())
    matrix.share = 0.25
    (some,) = matrix.parts()
    some.sum().backward()
    place = torch.arange(16)
    outside = (place.unsqueeze(1) - place).abs() > 4
    assert bool((some[outside] == 0).all())
    assert bool((matrix.trained[0].grad[outside] == 0).all())


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("network", ["vit", "llama"])
def test_a_graph_computes_the_same_with_them(name, network):
    given = ZOO[network]
    model, inputs = given.build(), given.inputs(4)
    module = trace(model, inputs)
    layers: dict[object, list[object]] = {}
    for node in module.graph.nodes:
        if is_call(node, {torch.ops.aten.linear.default}):
            layers.setdefault(operand(node), []).append(node)
    for source, readers in layers.items():
        _disturbed(name, source.meta["val"].shape[-1]).fold(module, source, readers)
    module.graph.lint()
    Equivalence(model, inputs).check(name, module, locate=False)


@pytest.mark.parametrize("name", MATRICES)
def test_they_are_trained_and_handed_over(name):
    network = ZOO["vit"]
    model, inputs = network.build(), network.inputs(32)
    spec = QuantSpec(w_bits=4, a_bits=4, preset="fast", smoothing=name, smoothing_epochs=2)
    module, report = quantize(model, spec, inputs)
    with torch.no_grad():
        assert module(inputs).isfinite().all()
    assert [buffer for buffer, _ in module.named_buffers() if buffer.startswith("_matrix_")]
    assert any(unit.kind == "smoothing" and unit.loss_after <= unit.loss_before for unit in report.units)
