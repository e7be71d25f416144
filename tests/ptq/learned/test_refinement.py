"""CAT's refinement of scales and zero points."""

from __future__ import annotations

import pytest
import torch

from cat_plugin.ptq.graph.units import whole_model
from cat_plugin.ptq.learned.logit_training import LogitTraining
from cat_plugin.ptq.learned.quality import divergence
from cat_plugin.ptq.learned.refinement import refine
from tests.ptq.learned.prepared import fit_closed_form, prepare


def test_refinement_moves_scales_and_zero_points_only_and_lowers_the_divergence():
    model, module, prepared, spec, x = prepare()
    logits = fit_closed_form(prepared, x, spec)
    for layer in prepared.layers:  # the closed form leaves so small a model near its optimum
        layer.scale = layer.scale * 1.1
    with torch.no_grad():
        torch.testing.assert_close(logits, model(x), rtol=1e-4, atol=1e-5)
        before = float(divergence(module(x), logits, 2.0))
    kept = [(layer.q_weight.clone(), layer.bias.clone(), layer.scale.clone()) for layer in prepared.layers]
    settings = LogitTraining(steps=40, batch_size=32)
    outcome = refine(module, whole_model(module), x, logits, settings, torch.Generator().manual_seed(0))
    with torch.no_grad():
        after = float(divergence(module(x), logits, 2.0))
    assert outcome.after < outcome.before
    assert after < before
    assert outcome.after == pytest.approx(after, rel=1e-3)
    for layer, (q_weight, bias, scale) in zip(prepared.layers, kept, strict=True):
        assert torch.equal(layer.q_weight, q_weight)
        assert torch.equal(layer.bias, bias)
        assert layer.zero_point.dtype == torch.int64
        assert not torch.equal(layer.scale, scale)
