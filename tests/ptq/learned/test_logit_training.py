"""Training against the full-precision logits."""

from __future__ import annotations

import pytest
import torch

from cat_plugin.ptq.graph.units import whole_model
from cat_plugin.ptq.learned.logit_training import LogitTraining
from cat_plugin.ptq.learned.refinement import refine
from tests.ptq.learned.prepared import fit_closed_form, prepare


@pytest.mark.parametrize("augment", [False, True])
def test_a_step_on_the_logits_may_be_taken_in_pieces(augment):
    def moved(piece):
        _, module, prepared, spec, x = prepare()
        logits = fit_closed_form(prepared, x, spec)
        before = [layer.scale * 1.1 for layer in prepared.layers]
        for layer, scale in zip(prepared.layers, before, strict=True):
            layer.scale = scale
        settings = LogitTraining(steps=8, batch_size=32, augment=augment, piece=piece)
        refine(
            module, whole_model(module), x, logits, settings, torch.Generator().manual_seed(0), penalty=1.0
        )
        return torch.cat([x.scale / y - 1 for x, y in zip(prepared.layers, before, strict=True)])

    whole, pieces = moved(32), moved(5)
    assert float(whole.abs().max()) > 1e-3
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-5)
