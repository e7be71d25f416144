"""Gradients of activation steps, and drop masks."""

from __future__ import annotations

import pytest
import torch

from cat_plugin.ptq.learned.steps import DropMask, quantize_with_step
from cat_plugin.ptq.quantizers.uniform import ActQuantizer
from tests.ptq.models import small_inputs


@pytest.mark.parametrize(("zero", "low", "high"), [(0, 0, 3), (-1, -2, 1), (3, -8, 7)])
@pytest.mark.parametrize("dropped", [False, True])
def test_step_gradients_equal_the_formula(zero, low, high, dropped):
    x = small_inputs(4, 33, seed=1).requires_grad_()
    scale = torch.tensor(0.37, requires_grad=True)
    keep = (small_inputs(4, 33, seed=2) > 0).float() if dropped else None
    weights = small_inputs(4, 33, seed=3)
    y = quantize_with_step(x, scale, zero, low, high, keep)
    (y * weights).sum().backward()
    with torch.no_grad():
        ratio = x / scale
        q = torch.clamp(torch.round(ratio) + zero, low, high) - zero
        inside = (ratio > low - zero - 0.5) & (ratio < high - zero + 0.5)
        part = torch.ones_like(x) if keep is None else keep
        torch.testing.assert_close(y, part * q * scale + (1 - part) * x)
        torch.testing.assert_close(x.grad, weights * (part * inside + (1 - part)))
        expected = (weights * part * torch.where(inside, q - ratio, q)).sum()
        torch.testing.assert_close(scale.grad, expected, rtol=1e-4, atol=1e-4)


def test_training_forward_equals_the_hard_quantizer():
    quantizer = ActQuantizer(4)
    quantizer.set_range(0.213, -3, True)
    x = small_inputs(7, 50, seed=4)
    torch.testing.assert_close(
        quantize_with_step(x, quantizer.scale, -3, -8, 7), quantizer(x), rtol=1e-6, atol=0
    )


def test_masks_have_the_layout_and_the_share_asked_for():
    mask = DropMask(0.3, torch.Generator().manual_seed(0), torch.device("cpu"))
    x = torch.zeros(8, 16, 9, 9).contiguous(memory_format=torch.channels_last)
    keep = mask.like(x)
    assert keep.stride() == x.stride()
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    assert float(keep.mean()) == pytest.approx(0.7, abs=0.02)
    assert not torch.equal(keep, mask.like(x))
    assert DropMask(0.0, torch.Generator(), torch.device("cpu")).like(x) is None
