"""Rounding by one factor of the covariance: against numpy and the textbook's inverse of what is still free."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cat_plugin.ptq.closed_form import optimal_brain
from cat_plugin.ptq.closed_form.optimal_brain import spread_rounding
from tests.ptq.models import small_inputs

_K, _ROWS, _SETS = 21, 6, 2


def _textbook(weight, h, scale, zero, low, high):
    """GPTQ's equations 2 and 3 as they stand: invert what is left, round, spread, strike out."""
    found = np.zeros_like(weight)
    for row in range(len(weight)):
        left, w = list(np.argsort(-np.diag(h), kind="stable")), weight[row].copy()
        while left:
            j, inverse = left[0], np.linalg.inv(h[np.ix_(left, left)])
            found[row, j] = np.clip(np.round(w[j] / scale[row] + zero[row]), low, high)
            error = (w[j] - (found[row, j] - zero[row]) * scale[row]) / inverse[0, 0]
            w[left] -= error * inverse[0]
            left = left[1:]
    return found


@pytest.mark.parametrize("block", [128, 16])
def test_the_pass_equals_the_textbooks(monkeypatch, block):
    monkeypatch.setattr(optimal_brain, "_BLOCK", block)
    x = small_inputs(300, _K, seed=1) @ small_inputs(_K, _K, seed=2)
    h = torch.stack([x.T @ x / 300 + 0.1 * torch.eye(_K), torch.eye(_K) + x.T @ x / 900]).double()
    weight = small_inputs(_SETS * _ROWS, _K, seed=3).reshape(_SETS, _ROWS, _K).double()
    scale = weight.abs().amax(2, keepdim=True).float() / 2
    zero = torch.tensor([-1, 0, 1, 0, -1, 0]).reshape(1, _ROWS, 1).expand(_SETS, -1, -1)
    found = spread_rounding(weight, h, scale, zero, -2, 1, None, None)
    for one in range(_SETS):
        expected = _textbook(
            weight[one].numpy(),
            h[one].numpy(),
            scale[one, :, 0].double().numpy(),
            zero[one, :, 0].numpy(),
            -2,
            1,
        )
        assert (found[one].numpy() == expected).all()
    nearest = (weight / scale + zero).round().clamp(-2, 1)
    assert float((found != nearest).float().mean()) > 0.1
