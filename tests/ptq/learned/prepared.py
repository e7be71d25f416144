"""A small model prepared, fitted and trained, for the tests of what is trained."""

from __future__ import annotations

import torch

from cat_plugin.ptq import QuantSpec
from cat_plugin.ptq.cache import TensorStore
from cat_plugin.ptq.closed_form.sequence import SequentialFit
from cat_plugin.ptq.graph.fold import fold_batch_norm
from cat_plugin.ptq.graph.insert import insert_quantizers
from cat_plugin.ptq.graph.trace import trace
from cat_plugin.ptq.graph.units import find_units
from cat_plugin.ptq.learned.losses import Tail, fisher_weights, prediction_difference
from cat_plugin.ptq.learned.quality import Quality
from cat_plugin.ptq.learned.reconstruction import Reconstruction, reconstruct
from cat_plugin.ptq.learned.rounding import Rates
from tests.ptq.models import SmallResNet, randomise, small_inputs


def prepare(**options):
    options = {"w_bits": 2, "a_bits": 2, "first_bits": None, "last_bits": None, "batch_size": 16} | options
    spec = QuantSpec(**options)
    model = randomise(SmallResNet())
    x = small_inputs(64, 3, 12, 12)
    module = trace(model, x)
    fold_batch_norm(module)
    prepared = insert_quantizers(module, spec)
    return model, module, prepared, spec, x


SHORT = Reconstruction(steps=120, batch_size=16, rates=Rates(weight=0.02))


def fit_closed_form(prepared, x, spec):
    """Fit every layer in closed form; the full-precision logits."""
    with TensorStore() as store:
        fit = SequentialFit(prepared, x, spec, store)
        assert not list(fit.run())
        (logits,) = fit.results.values()
        return logits


def train_units(settings, *, w_bits=2, **extra):
    _, module, prepared, spec, x = prepare(w_bits=w_bits)
    outcomes = {}

    with TensorStore() as store:
        for fitted in SequentialFit(prepared, x, spec, store, changed=True).run(find_units(module)):
            unit, y = fitted.unit, fitted.targets
            tail = Tail(module, unit, Quality())
            outcomes[unit.name] = reconstruct(
                module,
                unit,
                fitted.inputs,
                fitted.full_inputs,
                y,
                settings,
                torch.Generator().manual_seed(0),
                weights=fisher_weights(tail, y, 16) if extra.get("fisher") else None,
                guidance=prediction_difference(tail, y, extra.get("guidance", 0.0), 2.0),
            )
    return outcomes, prepared
