"""The map of the last hidden state: its target in double precision, and what it gains on windows not seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import cat_plugin
from cat_plugin.cluster_affine import ClusterAffine
from cat_plugin.errors import CalibrationError, CATTypeError
from cat_plugin.graph.export import export_program
from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.graph.trace import trace
from cat_plugin.tokens import _Head
from tests.zoo import ZOO

_NETWORK = ZOO["llama"]


def _quantized(**options):
    model = _NETWORK.build()
    plain = {"compensation": False, "refit": False, "bias_correction": False, "last_bits": 8}
    spec = QuantSpec(w_bits=2, preset="fast", weight_only=True, batch_size=8, **plain, **options)
    return model, quantize(model, spec, _NETWORK.inputs(32))[0]


@pytest.mark.parametrize("options", [{}, {"rotation": "folded"}])
def test_states_come_nearer_on_windows_that_were_not_seen(options):
    model, quantized = _quantized(**options)
    corrected, estimator = cat_plugin.correct_tokens(quantized, model, _NETWORK.inputs(256))
    assert estimator.parameters_.mode == "lowrank"
    x = _NETWORK.inputs(64, seed=5)
    with torch.no_grad():
        wanted, before, after = model(x), quantized(x), corrected(x)
    assert float((after - wanted).square().mean()) < 0.95 * float((before - wanted).square().mean())
    program = export_program(corrected, x[:2])
    assert any(str(node.target).startswith("cat.cluster_affine_lowrank") for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), after, rtol=1e-4, atol=1e-4)


def test_the_target_is_the_state_whose_logits_are_nearest_in_double_precision():
    model, quantized = _quantized(rotation="folded")
    mine, other = _Head(quantized), _Head(trace(model, _NETWORK.inputs(2)))
    matrix, offset = (value.numpy() for value in mine.basis_of(other))
    h = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).double().numpy()
    logits = h @ other.weight.numpy().T
    expected = np.linalg.lstsq(mine.weight.numpy(), logits.T, rcond=None)[0].T
    np.testing.assert_allclose(h @ matrix.T + offset, expected, rtol=1e-3, atol=1e-4)
    assert str(mine.hidden.target) == "aten.rms_norm.default"


def test_an_estimator_of_the_callers_is_used():
    model, quantized = _quantized()
    estimator = ClusterAffine(mode="diagonal", n_clusters=2, alpha=1.0, random_state=0)
    corrected, same = cat_plugin.correct_tokens(quantized, model, _NETWORK.inputs(64), estimator)
    assert same is estimator
    assert corrected.token_map.map.mode == "diagonal"
    assert not hasattr(quantized, "token_map")


def test_what_others_rounded_is_corrected_as_well():
    model, rounded = _NETWORK.build(), _NETWORK.build()
    with torch.no_grad():
        for layer in rounded.modules():
            if isinstance(layer, nn.Linear):
                step = layer.weight.abs().amax(1, keepdim=True) / 1.5
                layer.weight.copy_(torch.round(layer.weight / step).clamp(-2, 1) * step)
    corrected, _ = cat_plugin.correct_tokens(rounded.train(), model, _NETWORK.inputs(256))
    x = _NETWORK.inputs(64, seed=5)
    with torch.no_grad():
        wanted, before, after = model(x), rounded.eval()(x), corrected(x)
    assert float((after - wanted).square().mean()) < 0.95 * float((before - wanted).square().mean())
    assert not hasattr(rounded, "token_map")


def test_models_that_have_no_tokens_are_refused():
    model, quantized = _quantized()
    with pytest.raises(CATTypeError, match=r"is a str; expected a torch\.nn\.Module"):
        cat_plugin.correct_tokens("model", model, _NETWORK.inputs(4))

    class Bare(nn.Module):
        def forward(self, x):
            return x.float().unsqueeze(-1) * 2.0

    with pytest.raises(CalibrationError, match="does not end in one linear layer"):
        cat_plugin.correct_tokens(quantized, Bare(), _NETWORK.inputs(4))
