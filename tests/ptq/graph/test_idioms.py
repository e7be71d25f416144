"""Every idiom and every network of the zoo through the whole engine: each stage is checked against the model itself.

The stages compare themselves with the caller's model; these tests see that the comparison is made, and that nothing is
refused that need not be.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cat_plugin.equivalence import Equivalence
from cat_plugin.errors import QuantizationError
from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.graph.fold import fold_batch_norm
from cat_plugin.ptq.graph.trace import trace
from tests.zoo import ZOO
from tests.zoo.idioms import COMPUTED_WEIGHTS, IDIOMS, idiom


def _images(count: int) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def _largest_difference(module: nn.Module, model: nn.Module, inputs: Tensor) -> float:
    """Over one row and five, as a share of the largest logit."""
    worst = 0.0
    with torch.no_grad():
        for count in (1, 5):
            expected = model(inputs[:count].clone())
            found = module(inputs[:count].clone())
            assert found.shape == expected.shape
            worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    return worst


@pytest.mark.parametrize("name", IDIOMS)
def test_idioms_are_traced_as_they_are(name: str) -> None:
    model = idiom(name)
    module = trace(model, _images(2))
    assert _largest_difference(module, model, _images(8)) < 1e-5
    fold_batch_norm(module)
    assert _largest_difference(module, model, _images(8)) < 1e-5
    assert not [
        n for n in module.graph.nodes if n.op == "call_function" and str(n.target).endswith("_.default")
    ]


@pytest.mark.parametrize("name", IDIOMS)
def test_idioms_are_quantized(name: str) -> None:
    model = idiom(name)
    inputs = _images(32)
    quantized, report = quantize(
        model, QuantSpec(w_bits=8, a_bits=8, preset="fast", num_samples=32), inputs.split(16)
    )
    assert _largest_difference(quantized, model, inputs) < 0.03
    assert len(report.layers) >= 2


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize(("bits", "most"), [(8, 0.05), (4, 0.3)])
def test_networks_are_quantized(name: str, bits: int, most: float) -> None:
    network = ZOO[name]
    model, inputs = network.build(), network.inputs(32)
    spec = QuantSpec(w_bits=bits, a_bits=bits, preset="fast", num_samples=32)
    quantized, _ = quantize(model, spec, inputs.split(16))
    assert _largest_difference(quantized, model, network.inputs(8, seed=7)) < most


@pytest.mark.parametrize("name", COMPUTED_WEIGHTS)
def test_weights_computed_from_parameters_are_quantized(name: str) -> None:
    _, report = quantize(idiom(name), QuantSpec(preset="fast", num_samples=32), _images(32).split(16))
    assert [layer.kind for layer in report.layers] == ["conv2d", "linear"]
    assert not report.unquantized


class _Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x + torch.rand_like(x))


def test_a_model_that_draws_random_numbers_is_refused() -> None:
    with pytest.raises(QuantizationError, match="different outputs for the same inputs"):
        quantize(_Random().eval(), QuantSpec(preset="fast"), [torch.randn(8, 4)])


class _Permuted(nn.Module):
    """The same numbers at every call, from a generator that a graph cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x[:, torch.randperm(8, generator=torch.Generator().manual_seed(0))])


def test_numbers_drawn_from_a_seed_at_every_call_are_refused() -> None:
    with pytest.raises(QuantizationError, match=r"draws random numbers where it is called \(aten.randperm"):
        quantize(_Permuted().eval(), QuantSpec(preset="fast"), [torch.randn(16, 8)])


def test_a_step_that_breaks_the_model_is_an_error_that_names_it_and_the_module() -> None:
    model = idiom("clone-before")
    inputs = _images(4)
    equivalence = Equivalence(model, inputs)
    module = trace(model, inputs[:2])
    equivalence.check("trace", module)
    module.conv2_weight.mul_(1.1)
    with pytest.raises(QuantizationError, match=r"after the step 'broken'.*on 1 calibration row;.*'conv2'"):
        equivalence.check("broken", module)


def test_a_result_of_another_shape_is_a_difference() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)).eval()
    equivalence = Equivalence(model, _images(4))
    other = trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 6)).eval(), _images(2))
    with pytest.raises(QuantizationError, match=r"shape \(1, 6\) for \(1, 5\)"):
        equivalence.check("trace", other)


class _FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.view(2, 2, 2).flatten(1))


def test_the_line_that_fixes_the_batch_is_named() -> None:
    model = _FixedBatch().eval()
    with pytest.raises(
        QuantizationError, match=r"fixes the batch size at .*test_idioms.py, line \d+: return self.fc"
    ):
        trace(model, torch.randn(2, 4))


class _Counting(nn.Module):
    """Leaves a count behind, which its result does not depend on; and one whose result does."""

    def __init__(self, used: bool) -> None:
        super().__init__()
        self.fc, self.used = nn.Linear(4, 3), used
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(x) * (self.calls if self.used else 1)


def test_what_a_model_leaves_behind_in_its_buffers_is_dropped() -> None:
    model = _Counting(used=False).eval()
    inputs = torch.randn(16, 4)
    quantized, _ = quantize(model, QuantSpec(w_bits=8, a_bits=8, preset="fast"), [inputs])
    assert _largest_difference(quantized, model, inputs) < 0.03


def test_a_model_whose_result_depends_on_earlier_calls_is_refused() -> None:
    with pytest.raises(QuantizationError, match="different outputs for the same inputs"):
        quantize(_Counting(used=True).eval(), QuantSpec(preset="fast"), [torch.randn(16, 4)])


def test_inputs_that_the_model_writes_into_are_left_as_they_were() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x -= 0.5
            return self.fc(x.relu_())

    model = Writes().eval()
    inputs = torch.randn(16, 4)
    before = inputs.clone()
    quantized, _ = quantize(model, QuantSpec(w_bits=8, a_bits=8, preset="fast"), [inputs])
    assert torch.equal(inputs, before)
    assert _largest_difference(quantized, model, before.clone()) < 0.03
