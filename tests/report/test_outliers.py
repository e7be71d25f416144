"""Channels that stand out, before and after smoothing."""

from __future__ import annotations

import pytest
import torch

from cat_plugin.graph.export import export_program
from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.report.outliers import has_layer_norms, outliers
from tests.ptq.models import Attention, SmallResNet, randomise, small_inputs


def test_layer_norms_are_seen() -> None:
    assert has_layer_norms(Attention())
    assert not has_layer_norms(SmallResNet())


@pytest.mark.parametrize("smoothing", [None, "smoothquant"])
def test_a_loud_channel_is_told_and_smoothing_lowers_it(smoothing: str | None) -> None:
    model, x = randomise(Attention()), small_inputs(16, 3, 16, 16)
    with torch.no_grad():
        model.norm2.weight[3] = 50.0
    quantized, _ = quantize(
        model, QuantSpec(w_bits=8, a_bits=8, preset="fast", smoothing=smoothing, equalization=False), x
    )
    found = {each["name"]: each for each in outliers(model, export_program(quantized, x[:2]), x, 4)}
    assert {"qkv", "proj", "up", "down"} <= set(found)

    with torch.no_grad():  # by hand, of the layer behind the norm
        seen: list[torch.Tensor] = []
        handle = model.up.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(x)
        handle.remove()
    peaks = seen[0].abs().reshape(-1, 16).amax(0)
    assert found["up"]["before"] == pytest.approx(float(peaks.max() / peaks.median()), rel=1e-5)
    if smoothing is None:
        assert found["up"]["after"] == pytest.approx(found["up"]["before"], rel=0.1)
    else:
        assert found["up"]["after"] < found["up"]["before"] / 3
