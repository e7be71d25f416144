"""Which modules are taken, and what becomes of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cat_plugin.errors import QuantizationError
from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.graph.accept import acceptable

SPEC = QuantSpec(w_bits=8, a_bits=8, preset="fast", num_samples=16)


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    ).eval()


def _error(quantized: nn.Module, model: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad():
        expected = model(inputs)
        return float((quantized(inputs) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types_are_computed_in_float32_and_said(kind: torch.dtype) -> None:
    inputs = torch.randn(16, 3, 8, 8)
    model = _network().to(kind)
    quantized, report = quantize(model, SPEC, [inputs.to(kind)])
    assert quantized(inputs).dtype == torch.float32
    assert _error(quantized, _network().to(kind).float(), inputs) < 0.03
    assert any(f"{kind}".removeprefix("torch.") in note and "float32" in note for note in report.notes)
    assert next(model.parameters()).dtype == kind  # the caller's model is left as it was


def test_wrappers_are_looked_through() -> None:
    inputs, model = torch.randn(16, 3, 8, 8), _network()
    assert acceptable(nn.DataParallel(model))[0] is model
    assert acceptable(torch.compile(model))[0] is model
    quantized, _ = quantize(nn.DataParallel(model), SPEC, [inputs])
    assert _error(quantized, model, inputs) < 0.03


def test_models_that_hold_no_code_or_no_values_are_refused() -> None:
    with pytest.raises(QuantizationError, match="TorchScript"):
        quantize(torch.jit.trace(_network(), torch.randn(1, 3, 8, 8)), SPEC, [torch.randn(8, 3, 8, 8)])
    with torch.device("meta"):
        empty = _network()
    with pytest.raises(QuantizationError, match=r"4 of the model's parameters have no values .* '0.weight'"):
        quantize(empty, SPEC, [torch.randn(8, 3, 8, 8)])


def test_autocast_inside_the_model_is_computed_in_float32() -> None:
    class Autocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.conv(x).relu()
            return self.fc(y.float().mean((2, 3)))

    model, inputs = Autocast().eval(), torch.randn(16, 3, 8, 8)
    quantized, report = quantize(model, SPEC, [inputs])
    assert [layer.kind for layer in report.layers] == ["conv2d", "linear"]
    assert _error(quantized, model, inputs) < 0.05
