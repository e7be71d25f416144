"""Patches and moments of a layer's inputs."""

from __future__ import annotations

import pytest
import torch

from cat_plugin.ptq.closed_form import grid_products, moments
from cat_plugin.ptq.closed_form.grid_products import Grid, byte_products
from cat_plugin.ptq.closed_form.moments import input_patches, measure
from cat_plugin.ptq.quantizers.per_token import TokenQuantizer
from cat_plugin.ptq.quantizers.uniform import ActQuantizer
from tests.ptq.closed_form.layers import LAYERS, make_layer
from tests.ptq.models import small_inputs


@pytest.mark.parametrize("case", LAYERS)
def test_patches_times_weight_is_the_layer(case):
    layer, x = make_layer(case)
    patches = input_patches(layer, x)
    weight = layer.weight.reshape(layer.groups, -1, patches.shape[2])
    rows = torch.einsum("gpk,grk->gpr", patches, weight)
    y = layer.compute(x, layer.weight, None)
    columns = y if layer.kind == "linear" else y.movedim(1, -1)
    expected = columns.reshape(-1, layer.groups, weight.shape[1]).transpose(0, 1)
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", LAYERS[:-1])
def test_patches_at_some_positions_are_those_of_all(case):
    layer, x = make_layer(case)
    everything = input_patches(layer, x)
    per_image = everything.shape[1] // len(x)
    positions = torch.tensor([per_image - 1, 0, per_image // 2])
    expected = everything.unflatten(1, (len(x), per_image))[:, :, positions].flatten(1, 2)
    assert torch.equal(input_patches(layer, x, positions), expected)


@pytest.mark.parametrize("case", LAYERS[:-1])
def test_patches_of_images_padded_one_by_one_are_those_of_all(case, monkeypatch):
    layer, x = make_layer(case)
    positions = torch.tensor([0, 3])
    expected = input_patches(layer, x, positions)
    monkeypatch.setattr(moments, "_PADDED", 1)
    assert torch.equal(input_patches(layer, x, positions), expected)


def test_sampling_positions_keeps_the_moments():
    layer, x = make_layer(LAYERS[0])
    x = small_inputs(64, *x.shape[1:], seed=7)
    y = layer.compute(x, layer.weight, layer.bias)
    everything = measure(layer, x, y, 1 << 30, 16, torch.Generator())
    some = measure(layer, x, y, y.numel() // 6 // 3, 16, torch.Generator().manual_seed(0))
    assert float((some.h - everything.h).norm() / everything.h.norm()) < 0.2


@pytest.mark.parametrize("case", LAYERS[:-1])
def test_few_patches_at_a_time_give_the_moments_of_a_whole_batch(case, monkeypatch):
    layer, x = make_layer(case)
    y, sizes = layer.compute(x, layer.weight, layer.bias), []
    expected = measure(layer, x, y, 1 << 30, 8, torch.Generator())

    def counted(*args):
        sizes.append(input_patches(*args).numel())
        return input_patches(*args)

    monkeypatch.setattr(moments, "input_patches", counted)
    monkeypatch.setattr(moments, "PATCHES", 1)  # so that it is one image
    found = measure(layer, x, y, 1 << 30, 8, torch.Generator())
    assert max(sizes) == input_patches(layer, x[:1]).numel()
    torch.testing.assert_close(found.h, expected.h, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.c, expected.c, rtol=1e-4, atol=1e-5)
    assert len(found.halves) == len(expected.halves)


@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize(
    ("bits", "zero_point", "signed"), [(2, 0, False), (4, -3, True), (8, 0, False), (8, 7, True)]
)
@pytest.mark.parametrize("most", [1 << 30, 60])
def test_moments_on_a_grid_are_those_of_its_values(case, bits, zero_point, signed, most):
    layer, x = make_layer(case)
    quantizer = ActQuantizer(bits)
    quantizer.set_range(0.37, zero_point, signed)
    x = quantizer(x * 40 if bits == 8 else x)
    y = layer.compute(x, layer.weight, layer.bias)
    grid = Grid.of(quantizer)
    assert grid is not None
    found = measure(layer, x, y, most, 2, torch.Generator().manual_seed(0), grid=grid)
    layer, x, y = layer.double(), x.double(), y.double()
    expected = measure(layer, x, y, most, 2, torch.Generator().manual_seed(0))
    for a, b in ((found, expected), *zip(found.halves, expected.halves, strict=True)):
        torch.testing.assert_close(a.h, b.h, rtol=1e-6, atol=1e-6 * float(b.h.abs().max()))
        torch.testing.assert_close(a.c, b.c, rtol=1e-4, atol=1e-5 * float(b.c.abs().max()), check_dtype=False)
        torch.testing.assert_close(a.mean_x, b.mean_x, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(a.mean_y, b.mean_y, rtol=1e-5, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("fast", [True, False], ids=["bytes", "floats"])
def test_products_of_more_rows_than_one_sum_holds_are_exact(monkeypatch, fast):
    monkeypatch.setattr(grid_products, "bytes_multiply_fast", lambda: fast)
    columns = torch.full((3, (1 << 17) + 5), -128, dtype=torch.int8)
    columns[1] = 127
    second, first = byte_products(columns)
    values = columns.double()
    assert torch.equal(second.double(), values @ values.T)
    assert torch.equal(first.double(), values.sum(1))


@pytest.mark.parametrize("quantizer", [ActQuantizer(4), TokenQuantizer(4), torch.nn.Identity()])
def test_what_has_no_grid_of_its_own_has_none(quantizer):
    if isinstance(quantizer, TokenQuantizer):
        quantizer.set_range(1.0)
    assert Grid.of(quantizer) is None
