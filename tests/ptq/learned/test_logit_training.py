"""Training against the full-precision logits."""

from __future__ import annotations

import pytest
import torch

from cat_plugin.ptq.graph.units import whole_model
from cat_plugin.ptq.learned.logit_training import LogitTraining, divergence
from cat_plugin.ptq.learned.refinement import refine
from tests.ptq.learned.prepared import fit_closed_form, prepare
from tests.ptq.models import small_inputs


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


def test_divergence_is_kullback_leibler():
    z_q, z_fp = small_inputs(5, 7, seed=1).double(), small_inputs(5, 7, seed=2).double()
    p, q = torch.softmax(z_fp / 3, 1), torch.softmax(z_q / 3, 1)
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(divergence(z_q, z_fp, 3.0), expected)
