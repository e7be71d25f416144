"""The engine on a device that is not the processor: nothing mixes the two, and the result is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.closed_form.grid_products import Grid
from cat_plugin.ptq.presets import plan
from tests.ptq.models import Attention, GroupedNet, SmallResNet, Uneven, randomise, small_inputs
from tests.zoo import ZOO

TRAINED = {"unit_steps": 4, "model_steps": 4, "refinement_steps": 4, "preset": "best"}
CASES = [
    (SmallResNet, (32, 3, 12, 12), {}),
    (SmallResNet, (32, 3, 12, 12), {"w_bits": 2, **TRAINED}),
    (SmallResNet, (32, 3, 12, 12), {**TRAINED, "unit": "pack", "rounding": "adaround"}),
    (SmallResNet, (32, 3, 12, 12), {"weight_budget": 5.0, "loss": "fisher"}),
    (GroupedNet, (32, 4, 8, 8), {"a_bits": 8}),
    (Uneven, (16, 3, 6, 6), {"memory_mb": 0}),
    (GroupedNet, (32, 4, 8, 8), {"memory_mb": 0, **TRAINED}),
    (Attention, (32, 3, 16, 16), {"memory_mb": 0}),
    (Attention, (32, 3, 16, 16), {"attention_bits": 4, "smoothing": "lrquant", "smoothing_epochs": 1}),
    (Attention, (32, 3, 16, 16), {"smoothing": "repq", **TRAINED}),
    (
        Attention,
        (32, 3, 16, 16),
        {"smoothing": "searched", "attention_bits": 4, "softmax_grid": "logarithmic"},
    ),
    (Attention, (32, 3, 16, 16), {"smoothing": "searched", "loss": "curvature", **TRAINED}),
    (Attention, (32, 3, 16, 16), {"a_granularity": "token", "weight_groups": 8, "smoothing": "lrquant"}),
]


LANGUAGE = [
    {"weight_only": True, "weight_groups": 8},
    {"a_granularity": "token", "rotation": "online", "a_bits": 4},
]


def _apart(model: nn.Module, x: Tensor, spec: QuantSpec) -> float:
    """How far the results of the two devices lie apart, as a share of the error of quantization."""
    from tests.ptq.other_device import other_device

    # Products of bytes are a processor's only, and training makes much of the last digits that tell them from sums of floats.
    alike = patch.object(Grid, "of", return_value=None) if plan(spec).trains else nullcontext()
    with alike:
        here, _ = quantize(model, spec, x)
    with other_device() as device:
        there, _ = quantize(model, spec, x, device=device)
    assert {buffer.device.type for buffer in there.buffers()} == {"cpu"}
    with torch.no_grad():
        expected, ours, theirs = model(x), here(x), there(x)
    return float((theirs - ours).square().mean() / (ours - expected).square().mean())


def _classifier(make: Callable[[], nn.Module], shape: tuple[int, ...], options: dict[str, Any]) -> float:
    spec = QuantSpec(**{"w_bits": 4, "a_bits": 4, "preset": "fast", "batch_size": 8, **options})
    return _apart(randomise(make()), small_inputs(*shape), spec)


def _language_model(options: dict[str, Any]) -> float:
    network = ZOO["llama"]
    return _apart(network.build(), network.inputs(16), QuantSpec(preset="fast", batch_size=4, **options))


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[ProcessPoolExecutor]:
    """A process of its own: PyTorch knows a further kind of device there, for good."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize(("make", "shape", "options"), CASES)
def test_the_engine_keeps_to_one_device(elsewhere, make, shape, options):
    apart = elsewhere.submit(_classifier, make, shape, options).result()
    # Optimizers sum in another order there: trained scales differ in their last digits.
    assert apart < (0.5 if "unit_steps" in options or "smoothing_epochs" in options else 1e-4)


@pytest.mark.parametrize("options", LANGUAGE)
def test_language_models_keep_to_one_device(elsewhere, options):
    # Sums in another order there: a weight half way between two integers may fall to either side.
    assert elsewhere.submit(_language_model, options).result() < 0.05
