"""Calibration inputs made from the model alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cat_plugin.errors import CalibrationError, CATValueError
from cat_plugin.ptq import QuantSpec, quantize, synthetic_inputs
from tests.zoo import ZOO


def _distance(model: nn.Module, inputs: Tensor) -> float:
    """How far the statistics in front of the BatchNorms are from those stored, by numpy in float64."""
    found: list[float] = []

    def compare(norm: Any, given: tuple[Tensor, ...]) -> None:
        x = given[0].double().numpy()
        axes = (0, *range(2, x.ndim))
        deviation = (norm.running_var.double().numpy() + norm.eps) ** 0.5
        mean = (x.mean(axes) - norm.running_mean.double().numpy()) / deviation
        spread = (x.var(axes) + norm.eps) ** 0.5 / deviation - 1
        found.append(float((mean**2).mean() + (spread**2).mean()))

    hooks = [m.register_forward_pre_hook(compare) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        model(inputs)
    for hook in hooks:
        hook.remove()
    return sum(found)


def _trained_on(model: nn.Module, inputs: Tensor) -> nn.Module:
    """The model with the running statistics of these inputs."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        model.train()(inputs)
    return model.eval()


def test_distilled_inputs_have_the_statistics_that_batch_norm_remembers() -> None:
    network = ZOO["se-resnet"]
    model = _trained_on(network.build(), 2.0 * network.inputs(64) + 0.7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start = synthetic_inputs(model, network.shape, 32, source="fractal")
    made = synthetic_inputs(model, network.shape, 32, steps=60)
    assert _distance(model, made) < 0.25 * _distance(model, start)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(made, synthetic_inputs(model, network.shape, 32, steps=60))
    assert not torch.equal(made, synthetic_inputs(model, network.shape, 32, steps=60, seed=1))


def test_fractal_images_have_more_power_at_low_frequencies() -> None:
    images = synthetic_inputs(nn.Linear(1, 1), (3, 32, 32), 64, source="fractal")
    power = torch.fft.rfft2(images).abs().square().mean((0, 1))
    assert images.shape == (64, 3, 32, 32)
    assert float(power[1, 1]) > 20 * float(power[12, 12])


@pytest.mark.parametrize("shape", [(24,), (3, 24), (20, 6)])
def test_any_rank(shape: tuple[int, ...]) -> None:
    assert synthetic_inputs(nn.Identity(), shape, 5).shape == (5, *shape)


def test_a_model_is_quantized_without_data_and_said_so() -> None:
    network = ZOO["se-resnet"]
    model = network.build()
    spec = QuantSpec(w_bits=8, a_bits=8, preset="fast", num_samples=32)
    quantized, report = quantize(model, spec, None, input_shape=network.shape)
    assert any("no calibration inputs were given: 32 were made" in note for note in report.notes)
    real = network.inputs(16)
    with torch.no_grad():
        error = (quantized(real) - model(real)).norm() / model(real).norm()
    assert float(error) < 0.05


def test_mistakes_are_said() -> None:
    with pytest.raises(CalibrationError, match="input_shape"):
        quantize(nn.Linear(3, 2), QuantSpec(), None)
    with pytest.raises(CATValueError, match=r"input_shape is \(3, 0\)"):
        synthetic_inputs(nn.Linear(3, 2), (3, 0))
    with pytest.raises(CATValueError, match="count is 0"):
        synthetic_inputs(nn.Linear(3, 2), (3,), 0)
    with pytest.raises(CATValueError, match="expected one of noise, fractal, distilled"):
        synthetic_inputs(nn.Linear(3, 2), (3,), source="images")
    with pytest.raises(CalibrationError, match="no BatchNorm"):
        synthetic_inputs(nn.Linear(3, 2), (3,), source="distilled")


def test_without_batch_norm_inputs_are_fractal_images_and_noise_where_they_are_none():
    images, rows = nn.Conv2d(3, 4, 3), nn.Linear(5, 4)
    assert torch.equal(
        synthetic_inputs(images, (3, 8, 8), 4), synthetic_inputs(images, (3, 8, 8), 4, source="fractal")
    )
    assert torch.equal(synthetic_inputs(rows, (5,), 4), synthetic_inputs(rows, (5,), 4, source="noise"))


def test_few_levels_are_not_chosen_on_inputs_that_nothing_is_known_of() -> None:
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    spec = QuantSpec(w_bits=4, a_bits=4, preset="fast", num_samples=8)
    with pytest.raises(CalibrationError, match=r"no BatchNorm that remembers any, and a_bits is 4.*a_bits=8"):
        quantize(plain, spec, None, input_shape=(3, 8, 8))
    for other in ({"a_bits": 8}, {"weight_only": True}):
        quantize(plain, QuantSpec(**{**spec.to_dict(), **other}), None, input_shape=(3, 8, 8))
