"""BF16 in training passes: dense layers within its rounding, all others as they are."""

import pytest
import torch
from torch import Tensor

from cat_plugin.ptq.graph.modules import QuantOp
from cat_plugin.ptq.learned.precision import compute_in_bf16

CONV = torch.ops.aten.conv2d.default
LINEAR = torch.ops.aten.linear.default
DENSE = {
    "convolution": (CONV, (16, 24, 3, 3), (2, 24, 6, 6), ([1, 1], [1, 1], [1, 1], 1)),
    "linear": (LINEAR, (64, 96), (5, 96), ()),
    "linear on tokens": (LINEAR, (96, 64), (3, 7, 64), ()),
}
FLOAT = {
    "depthwise": (CONV, (24, 1, 3, 3), (2, 24, 6, 6), ([1, 1], [1, 1], [1, 1], 24)),
    "few channels": (CONV, (16, 3, 3, 3), (2, 3, 6, 6), ([1, 1], [1, 1], [1, 1], 1)),
    "few features": (LINEAR, (10, 64), (5, 64), ()),
}


def layer_and_input(case: tuple) -> tuple[QuantOp, Tensor]:
    target, weight, x, extra = case
    torch.manual_seed(0)
    layer = QuantOp("layer", target, torch.randn(weight), torch.randn(weight[0]), extra, 4, 4)
    return layer, torch.randn(x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", DENSE.values(), ids=DENSE)
def test_a_dense_layer_and_its_gradients_are_within_the_rounding_of_bf16(case: tuple, bias: bool) -> None:
    layer, x = layer_and_input(case)
    given = [x.requires_grad_(), layer.weight.clone().requires_grad_()]
    given += [layer.bias.clone().requires_grad_()] if bias else []
    results = []
    for compute in (QuantOp.compute, compute_in_bf16):
        y = compute(layer, given[0], given[1], given[2] if bias else None)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), given)])
    # how large sums would be if nothing cancelled: each operand is off by 2^-9 of itself, and each result once more
    for exact, rounded in zip(*results, strict=True):
        assert rounded.dtype == torch.float32
        assert (exact - rounded).abs().max() <= 2**-6 * exact.abs().max()
    assert not torch.equal(results[0][0], results[1][0])
    if bias:  # what is added is not rounded: it comes back to the bit where the products are zero
        nothing = compute_in_bf16(layer, torch.zeros_like(x), layer.weight, layer.bias)
        axis = 1 if layer.kind == "conv2d" else -1
        assert torch.equal(nothing.movedim(axis, -1), layer.bias.expand(nothing.movedim(axis, -1).shape))


@pytest.mark.parametrize("case", FLOAT.values(), ids=FLOAT)
def test_what_is_not_faster_stays_in_float32(case: tuple) -> None:
    layer, x = layer_and_input(case)
    assert torch.equal(
        compute_in_bf16(layer, x, layer.weight, layer.bias), layer.compute(x, layer.weight, layer.bias)
    )
