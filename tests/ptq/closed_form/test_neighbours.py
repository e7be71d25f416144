"""8-bit weights whose neighbours can be multiplied as bytes: against counting in numpy, and against the free rounding."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch

from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.closed_form import coordinate_descent
from cat_plugin.ptq.closed_form.compensation import fit_integers
from cat_plugin.ptq.closed_form.moments import measure
from cat_plugin.ptq.graph.modules import QuantOp
from cat_plugin.ptq.quantizers.neighbours import LIMIT, TOGETHER, bounded, partners
from cat_plugin.ptq.quantizers.observers import search_weight_range
from tests.ptq.models import small_inputs

_ATEN = torch.ops.aten


def largest_sum(stretches: np.ndarray, together: int = 2) -> int:
    """Greatest sum of neighbours of one sign, counted one by one; stretches (channels, number, length)."""
    worst = 0
    for channel in stretches.astype(int):
        rows = [row.tolist() + [0] * (-len(row) % 4) for row in channel]
        if len(rows[0]) == 4:
            rows = [[*chain.from_iterable(rows)]]
        for row in rows:
            padded = row + [0] * (len(row) % 8)
            for first in range(0, len(padded), 8):
                for half in (0, 2):
                    pairs = [padded[first + step + half : first + step + half + 2] for step in (0, 4)]
                    for some in pairs if together == 2 else [[*chain.from_iterable(pairs)]]:
                        for sign in (1, -1):
                            worst = max(worst, sum(max(sign * value, 0) for value in some))
    return worst


@pytest.mark.parametrize("together", [2, 4])
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
        ((4, 1, 5, 5), 1, 1, True),
        ((4, 11), 1, 1, True),
    ],
)
def test_neighbours_lie_side_by_side_in_what_is_multiplied(shape, groups, dilation, joined, together):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-128, 128, shape, generator=generator)
    neighbours = partners(shape, groups, dilation, together)
    found = bounded(weight.flatten(1).float(), neighbours).reshape(shape).numpy()
    spread = found.reshape(*shape[:2], *(1,) * (4 - len(shape)), *shape[2:]).transpose(0, 2, 3, 1)
    stretches = spread.reshape(
        shape[0], spread.shape[1] if joined else -1, shape[1] * (spread.shape[2] if joined else 1)
    )
    assert largest_sum(stretches, together) <= LIMIT
    before = weight.numpy()
    kept = found == before
    assert kept.all() or (np.abs(found[~kept]) < np.abs(before[~kept])).all()
    if shape[1] == 1 and together == 2 and not joined:
        assert kept.all()  # no channel has a neighbour


def test_they_give_way_by_as_little_as_they_must():
    values = torch.tensor([[100.0, 101.0, 127.0, 1.0, -128.0, -3.0, 90.0, -90.0]])
    found = bounded(values, partners((1, 8), 1, 1, 2))
    assert found.tolist() == [[63.0, 65.0, 127.0, 1.0, -127.0, -1.0, 90.0, -90.0]]
    found = bounded(values, partners((1, 8), 1, 1, 4))
    assert found.tolist() == [[63.0, 65.0, 83.0, 0.0, -127.0, -1.0, 45.0, -90.0]]


@pytest.mark.parametrize("together", [2, 4])
def test_real_weights_go_to_the_nearest_that_keep_to_the_limit(together):
    """No weights that keep to it are nearer: against a thousand that do, between the found ones and anywhere."""
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.normal(0, 90, (6, 16)))
    neighbours = partners((6, 16), 1, 1, together)
    found = bounded(values, neighbours)
    assert largest_sum(found.trunc().numpy()[:, None], together) <= LIMIT
    distance = (found - values).square().sum(1)
    for _ in range(1000):
        other = bounded(
            found + torch.from_numpy(rng.normal(0, rng.choice([0.1, 1, 10, 100]), (6, 16))), neighbours
        )
        assert ((other - values).square().sum(1) >= distance * (1 - 1e-9)).all()


@pytest.mark.parametrize("together", [2, 4])
@pytest.mark.parametrize(("scale_factors", "block"), [((1.0,), 256), ((1.0, 1.1, 1.25), 256), ((1.0,), 5)])
def test_the_bounded_rounding_loses_less_than_cutting_the_free_one(
    monkeypatch, scale_factors, block, together
):
    monkeypatch.setattr(coordinate_descent, "_BLOCK", block)  # of 5, neighbours lie in two blocks
    k, rows = 24, 16
    x = small_inputs(500, k, seed=1) @ small_inputs(k, k, seed=2)
    weight = small_inputs(rows, k, seed=3).sign() * (1 + 0.2 * small_inputs(rows, k, seed=4)).abs()
    layer = QuantOp("l", _ATEN.linear.default, weight, None, (), 8, 8)
    moments = measure(layer, x, x @ weight.T, 1 << 30, 64, torch.Generator())
    scale, zero = search_weight_range(weight, 8, symmetric=True)
    target, neighbours = weight.double().unsqueeze(0), partners((rows, k), 1, 1, together)

    def loss(integers, steps):
        error = (integers.double() * steps.double().unsqueeze(1) - weight.double()).numpy()
        return float(np.einsum("rk,kl,rl->", error, moments.h[0].numpy(), error))

    grid = (scale.unsqueeze(0), zero.unsqueeze(0), (-128, 127))
    free, free_scale = fit_integers(target, moments, *grid)
    assert largest_sum(free.numpy().swapaxes(0, 1), together) > LIMIT
    found, found_scale = fit_integers(target, moments, *grid, factors=scale_factors, neighbours=neighbours)
    assert largest_sum(found.numpy().swapaxes(0, 1), together) <= LIMIT
    cut = bounded(free[0].float(), neighbours)
    assert loss(found[0], found_scale[0]) < 0.5 * loss(cut, free_scale[0])


@pytest.mark.parametrize("sums", ["pairs", "fours"])
@pytest.mark.parametrize("options", [{}, {"compensation": False}, {"preset": "balanced", "unit_steps": 4}])
def test_every_8_bit_layer_of_a_model_keeps_to_it(options, sums):
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
    free = largest_of(model, inputs, TOGETHER[sums], bounded_sums=None, **options)
    assert largest_of(model, inputs, TOGETHER[sums], bounded_sums=sums, **options) <= LIMIT < free


def stretches_of(weight):
    """Weights of a layer without groups, or of one whose stretches are channels, as they are multiplied."""
    last = weight.reshape(*weight.shape[:2], *(1,) * (4 - weight.ndim), *weight.shape[2:]).permute(0, 2, 3, 1)
    grouped = weight.ndim == 4 and weight.shape[1] == 4  # half of 8 channels
    return (last.flatten(1, 2) if grouped else last.flatten(2)).numpy()


def largest_of(model, inputs, together=2, **options):
    """The largest sum among the neighbours of a quantized model of three layers."""
    quantized, _ = quantize(
        model, QuantSpec(**{"w_bits": 8, "a_bits": 8, "preset": "fast", **options}), [inputs]
    )
    stored = [value for value in quantized.state_dict().values() if value.dtype == torch.int8]
    assert len(stored) == 3
    return max(largest_sum(stretches_of(weight), together) for weight in stored)


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
    """With 128 as the bound of four and weights of one size, cut ones would be less than half as large; a coarser grid holds them."""
    torch.manual_seed(0)
    model = torch.nn.Linear(32, 4, bias=False).eval()
    model.weight.data = model.weight.sign() * (1 + 0.1 * model.weight.abs())
    inputs = small_inputs(16, 32, seed=5)
    options = {"compensation": False, "refit": False, "bias_correction": False, "preset": "fast"}
    options["bounded_sums"] = "fours"
    quantized, _ = quantize(model, QuantSpec(w_bits=8, a_bits=8, **options), [inputs])
    (integers,) = (value for value in quantized.state_dict().values() if value.dtype == torch.int8)
    assert largest_sum(integers.reshape(4, 1, 32).numpy(), 4) <= LIMIT
    with torch.no_grad():
        error = (quantized(inputs) - model(inputs)).square().mean() / model(inputs).square().mean()
    assert float(error) < 1e-3
