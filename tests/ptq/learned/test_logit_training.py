"""Training against the full-precision logits."""

from __future__ import annotations

import pytest
import torch

from cat_plugin.ptq.graph.units import whole_model
from cat_plugin.ptq.learned.logit_training import LogitTraining, _Divergence
from cat_plugin.ptq.learned.quality import Quality
from cat_plugin.ptq.learned.refinement import GridLayer, refine
from cat_plugin.ptq.learned.soft_unit import SoftUnit
from cat_plugin.ptq.rows import Rows
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


@pytest.mark.parametrize("augment", [False, True])
def test_each_row_held_out_is_judged_in_views_that_are_the_same_at_every_look(augment):
    _, module, prepared, spec, _ = prepare()
    x = small_inputs(160, 3, 16, 16)
    logits = fit_closed_form(prepared, x, spec)
    unit = whole_model(module)
    soft = SoftUnit(module, unit, GridLayer)
    settings = LogitTraining(augment=augment, piece=4)
    objective = _Divergence(
        soft, Rows.of(x), Rows.of(logits), settings, torch.Generator().manual_seed(0), None, Quality()
    )
    with torch.no_grad():
        first, again = objective.judge(), objective.judge()
        pieces = torch.cat([soft.run(Rows.of(some)).tensors[0] for some in x[150:].split(4)])
    plain = torch.stack([_kl(z, y) for z, y in zip(pieces, logits[150:], strict=True)])
    assert first.shape == (10,)
    assert torch.equal(first, again)
    assert torch.allclose(first, plain, rtol=1e-2) != augment
    if augment:  # a shift by a pixel does not make another image of it
        assert 0.3 < float(first.mean() / plain.mean()) < 3


def _kl(found, wanted):
    p, q = torch.softmax(wanted.double() / 2, 0), torch.softmax(found.double() / 2, 0)
    return (4 * (p * (p / q).log()).sum()).float()
