"""8-bit weights whose neighbours can be multiplied as bytes: against counting in numpy, and against the free rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.closed_form import coordinate_descent
from cat_plugin.ptq.closed_form.compensation import fit_integers
from cat_plugin.ptq.closed_form.moments import measure
from cat_plugin.ptq.graph.modules import QuantOp
from cat_plugin.ptq.quantizers.observers import search_weight_range
from cat_plugin.ptq.quantizers.pairs import LIMIT, bounded, partners
from tests.ptq.models import small_inputs

_ATEN = torch.ops.aten


def largest_sum(stretches: np.ndarray) -> int:
    """Greatest sum of two neighbours of one sign, counted pair by pair."""
    worst = 0
    for row in stretches.reshape(-1, stretches.shape[-1]).astype(int):
        for first, second in zip(row[::2], row[1::2], strict=False):
            if first * second > 0:
                worst = max(worst, abs(first) + abs(second))
    return worst


@pytest.mark.parametrize(
    ("shape", "groups", "dilation", "joined"),
    [
        ((4, 6), 1, 1, True),
        ((4, 6, 3, 3), 1, 1, True),
        ((4, 3, 3, 5), 1, 1, True),
        ((4, 3, 3, 3), 1, 2, False),
        ((4, 3, 3, 3), 2, 1, False),
        ((4, 1, 3, 3), 4, 1, False),
        ((4, 5, 3), 1, 1, True),
    ],
)
def test_neighbours_lie_side_by_side_in_what_is_multiplied(shape, groups, dilation, joined):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-128, 128, shape, generator=generator)
    found = bounded(weight.flatten(1).float(), partners(shape, groups, dilation)).reshape(shape).numpy()
    spread = found.reshape(*shape[:2], *(1,) * (4 - len(shape)), *shape[2:]).transpose(0, 2, 3, 1)
    stretches = spread.reshape(shape[0], spread.shape[1], -1) if joined else spread
    assert largest_sum(stretches) <= LIMIT
    before = weight.numpy()
    kept = found == before
    assert kept.all() or (np.abs(found[~kept]) < np.abs(before[~kept])).all()
    if shape[1] == 1:
        assert kept.all()  # no channel has a neighbour


def test_pairs_give_way_by_as_little_as_they_must():
    values = torch.tensor([[100.0, 101.0, 127.0, 1.0, -128.0, -3.0, 90.0, -90.0]])
    found = bounded(values, torch.arange(8) ^ 1)
    assert found.tolist() == [[63.0, 65.0, 127.0, 1.0, -126.0, -2.0, 90.0, -90.0]]


@pytest.mark.parametrize(("scale_factors", "block"), [((1.0,), 256), ((1.0, 1.1, 1.25), 256), ((1.0,), 5)])
def test_the_bounded_rounding_loses_less_than_cutting_the_free_one(monkeypatch, scale_factors, block):
    monkeypatch.setattr(coordinate_descent, "_BLOCK", block)  # of 5, neighbours lie in two blocks
    k, rows = 24, 16
    x = small_inputs(500, k, seed=1) @ small_inputs(k, k, seed=2)
    weight = small_inputs(rows, k, seed=3).sign() * (1 + 0.2 * small_inputs(rows, k, seed=4)).abs()
    layer = QuantOp("l", _ATEN.linear.default, weight, None, (), 8, 8)
    moments = measure(layer, x, x @ weight.T, 1 << 30, 64, torch.Generator())
    scale, zero = search_weight_range(weight, 8, symmetric=True)
    target, neighbours = weight.double().unsqueeze(0), torch.arange(k) ^ 1

    def loss(integers, steps):
        error = (integers.double() * steps.double().unsqueeze(1) - weight.double()).numpy()
        return float(np.einsum("rk,kl,rl->", error, moments.h[0].numpy(), error))

    grid = (scale.unsqueeze(0), zero.unsqueeze(0), (-128, 127))
    free, free_scale = fit_integers(target, moments, *grid)
    assert largest_sum(free[0].numpy()) > LIMIT
    found, found_scale = fit_integers(target, moments, *grid, factors=scale_factors, neighbours=neighbours)
    assert largest_sum(found[0].numpy()) <= LIMIT
    cut = bounded(free[0].float(), neighbours)
    assert loss(found[0], found_scale[0]) < 0.5 * loss(cut, free_scale[0])


@pytest.mark.parametrize("options", [{}, {"compensation": False}, {"preset": "balanced", "unit_steps": 4}])
def test_every_8_bit_layer_of_a_model_keeps_to_it(options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3, groups=2),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 36, 5),
    ).eval()
    for parameter in model.parameters():
        parameter.data = parameter.sign() * (0.2 + 0.02 * parameter.abs())
    inputs = small_inputs(32, 3, 8, 8, seed=5)
    assert (
        largest_of(model, inputs, **options)
        <= LIMIT
        < largest_of(model, inputs, bounded_pairs=False, **options)
    )


def largest_of(model, inputs, **options):
    """The largest sum among the neighbours of a quantized model of three layers."""
    quantized, _ = quantize(
        model, QuantSpec(**{"w_bits": 8, "a_bits": 8, "preset": "fast", **options}), [inputs]
    )
    stored = [value for value in quantized.state_dict().values() if value.dtype == torch.int8]
    assert len(stored) == 3
    return max(
        largest_sum(weight.reshape(*weight.shape[:2], -1).permute(0, 2, 1).numpy())
        for weight in stored
        if weight.shape[1] % 2 == 0
    )


@pytest.mark.parametrize("options", [{"weight_only": True}, {"a_bits": 7}])
def test_weights_whose_products_never_need_it_stay_free(options):
    torch.manual_seed(0)
    layers = [
        torch.nn.Linear(6, 6),
        torch.nn.ReLU(),
        torch.nn.Linear(6, 6),
        torch.nn.ReLU(),
        torch.nn.Linear(6, 2),
    ]
    model = torch.nn.Sequential(*layers).eval()
    model[2].weight.data = model[2].weight.sign() * (0.2 + 0.02 * model[2].weight.abs())
    inputs = small_inputs(32, 6, seed=5)
    assert largest_of(model, inputs, **options) > LIMIT >= largest_of(model, inputs)


def test_rounding_to_nearest_takes_a_coarser_grid_rather_than_cutting():
    """With 128 as the bound and weights of one size, cut ones would be half as large; a grid of twice the step holds them."""
    torch.manual_seed(0)
    model = torch.nn.Linear(32, 4, bias=False).eval()
    model.weight.data = model.weight.sign() * (1 + 0.1 * model.weight.abs())
    inputs = small_inputs(16, 32, seed=5)
    options = {"compensation": False, "refit": False, "bias_correction": False, "preset": "fast"}
    quantized, _ = quantize(model, QuantSpec(w_bits=8, a_bits=8, **options), [inputs])
    (integers,) = (value for value in quantized.state_dict().values() if value.dtype == torch.int8)
    assert largest_sum(integers.reshape(4, 1, 32).numpy()) <= LIMIT
    with torch.no_grad():
        error = (quantized(inputs) - model(inputs)).square().mean() / model(inputs).square().mean()
    assert float(error) < 1e-3
