"""The last block learned again on other inputs than those of the calibration."""

from __future__ import annotations

import pytest
import torch

from cat_plugin.errors import CATTypeError, CATValueError
from cat_plugin.ptq import QuantSpec, adapt, quantize
from tests.zoo import ZOO

_PLAIN = {"compensation": False, "refit": False, "bias_correction": False}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("encoder", {"w_bits": 3, "a_bits": 8, "attention_bits": 8}),
        ("llama", {"w_bits": 3, "a_bits": 8, "a_granularity": "token", "weight_groups": 8}),
    ],
)
def test_the_error_falls_on_inputs_that_were_not_trained_on(name, options):
    network = ZOO[name]
    model = network.build()
    quantized, _ = quantize(model, QuantSpec(preset="fast", **_PLAIN, **options), network.inputs(32))
    before = {key: value.clone() for key, value in quantized.named_buffers()}
    adapted, outcome = adapt(quantized, network.inputs(256, seed=7), model, epochs=8)
    assert outcome.after < outcome.before == pytest.approx(1.0)
    x = network.inputs(128, seed=9)
    with torch.no_grad():
        wanted = model(x)
        errors = [float((net(x) - wanted).square().mean()) for net in (quantized, adapted)]
    assert errors[1] < errors[0]
    assert all(torch.equal(value, before[key]) for key, value in quantized.named_buffers())
    moved = {key for key, value in adapted.named_buffers() if not torch.equal(value, before[key])}
    block = "layers.1." if name == "encoder" else "blocks.1."
    assert moved
    assert all(key.startswith(block) and key.endswith(("weight_scale", "bias")) for key in moved)


def test_layers_are_chosen_by_name_and_nothing_changes_where_nothing_is_gained():
    network = ZOO["encoder"]
    model = network.build()
    quantized, _ = quantize(model, QuantSpec(preset="fast", w_bits=4), network.inputs(16))
    adapted, _ = adapt(quantized, network.inputs(16), model, layers=["pooler"], epochs=1)
    before = dict(quantized.named_buffers())
    moved = {key for key, value in adapted.named_buffers() if not torch.equal(value, before[key])}
    assert moved <= {"pooler.weight_scale", "pooler.bias"}
    same, outcome = adapt(
        quantized, network.inputs(16), quantized.eval(), epochs=1
    )  # nothing is wrong with it
    assert "initial values kept" in outcome.note
    assert all(torch.equal(value, before[key]) for key, value in same.named_buffers())
    with pytest.raises(CATValueError, match="epochs is 0; expected 1 or more"):
        adapt(quantized, network.inputs(4), model, epochs=0)
    with pytest.raises(CATValueError, match="layers has the pattern 'poler', which matches no layer"):
        adapt(quantized, network.inputs(4), model, layers=["poler"])
    with pytest.raises(CATTypeError, match="expected the graph"):
        adapt(model, network.inputs(4), model)
