"""Scales for groups of a channel's inputs, against numpy in double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cat_plugin.errors import CATValueError
from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.closed_form.compensation import fit_integers
from cat_plugin.ptq.closed_form.moments import measure
from cat_plugin.ptq.graph.modules import QuantOp
from cat_plugin.ptq.quantizers.observers import search_weight_range
from tests.ptq.models import small_inputs
from tests.zoo import ZOO

_LINEAR = torch.ops.aten.linear.default
_ROWS, _FEATURES, _GROUP = 7, 24, 8


def _problem():
    """A layer whose groups of columns differ in size by orders of magnitude, on correlated inputs."""
    x = small_inputs(400, _FEATURES, seed=1) @ small_inputs(_FEATURES, _FEATURES, seed=2)
    sizes = torch.tensor([0.01, 1.0, 30.0]).repeat_interleave(_GROUP)
    weight = small_inputs(_ROWS, _FEATURES, seed=3) * sizes
    layer = QuantOp("l", _LINEAR, weight, None, (), 3, 8, _GROUP)
    return layer, measure(layer, x, x @ weight.T, 1 << 30, 64, torch.Generator())


def _losses(q, scale, zero, target, h):
    spread = [np.repeat(v.double().numpy(), _FEATURES // v.shape[1], 1) for v in (scale, zero)]
    error = (q.double().numpy() - spread[1]) * spread[0] - target.double().numpy()
    return np.einsum("rk,kl,rl->r", error, h, error)


def test_integers_and_scales_of_groups_beat_rounding_and_one_scale_a_channel():
    layer, moments = _problem()
    h, target = moments.h[0].numpy(), layer.weight.double().unsqueeze(0)
    found = {}
    for group in (None, _GROUP):
        scale, zero = (v.reshape(1, _ROWS, -1) for v in search_weight_range(layer.weight, 3, False, group))
        q, s = fit_integers(target, moments, scale, zero, (-4, 3))
        assert s.shape == scale.shape
        found[group] = _losses(q[0], s[0], zero[0], layer.weight, h)
        if group:
            layer.scale, layer.zero_point = scale[0], zero[0]
            nearest = _losses(layer.round_to_nearest(), scale[0], zero[0], layer.weight, h)
            # the scales are where no step of any of them gains anything: the normal equations of numpy
            centred = (q[0].double() - zero[0].repeat_interleave(_GROUP, 1)).numpy()
            for row in range(_ROWS):
                basis = np.zeros((_FEATURES, 3))
                for g in range(3):
                    some = slice(g * _GROUP, (g + 1) * _GROUP)
                    basis[some, g] = centred[row, some]
                damped = h + 0.01 * np.trace(h) / _FEATURES * np.eye(_FEATURES)
                best = np.linalg.solve(basis.T @ damped @ basis, basis.T @ damped @ target[0, row].numpy())
                loss = [
                    (basis @ v - target[0, row].numpy()) @ damped @ (basis @ v - target[0, row].numpy())
                    for v in (s[0, row].double().numpy(), best)
                ]
                assert loss[0] <= 1.1 * loss[1] + 1e-9
    assert found[_GROUP].sum() < 0.7 * nearest.sum()
    assert found[_GROUP].sum() < 0.7 * found[None].sum()


def test_rows_are_fitted_in_portions_where_there_are_many(monkeypatch):
    layer, moments = _problem()
    scale, zero = (v.unsqueeze(0) for v in search_weight_range(layer.weight, 3, False, _GROUP))
    given = (layer.weight.double().unsqueeze(0), moments, scale, zero, (-4, 3))
    q, s = fit_integers(*given)
    monkeypatch.setattr("cat_plugin.ptq.closed_form.compensation._ROWS", 3)
    again, other = fit_integers(*given)
    assert torch.equal(q, again)
    torch.testing.assert_close(s, other)


@pytest.mark.parametrize("preset", ["fast", "balanced"])
def test_a_quantized_model_computes_with_the_groups(preset):
    network = ZOO["llama"]
    model, x = network.build(), network.inputs(16)
    options = {"unit_steps": 3, "refinement_steps": 3} if preset == "balanced" else {}
    spec = QuantSpec(w_bits=3, weight_only=True, preset=preset, weight_groups=8, last_bits=None, **options)
    module, report = quantize(model, spec, x)
    parts = dict(module.named_buffers())
    names = [layer.name for layer in report.layers]
    assert len(names) == 15
    for name in names:
        stored = [parts[f"{name}.{part}"] for part in ("weight", "weight_scale", "weight_zero_point")]
        assert stored[1].shape == (len(stored[0]), stored[0].shape[1] // 8)
        node = next(n for n in module.graph.nodes if n.target == f"{name}.weight")
        (user,) = node.users
        found = user.target(*stored, *user.args[3:])
        q, s, z = (v.double().numpy() for v in stored)
        expected = (q.reshape(len(q), -1, 8) - z[..., None]) * s[..., None]
        np.testing.assert_allclose(found.numpy(), expected.reshape(q.shape), rtol=1e-6)
    error = (module(x) - model(x)).norm() / model(x).norm()
    assert float(error) < 0.5


def test_groups_that_do_not_divide_the_features_are_made_smaller():
    network = ZOO["llama"]
    module, _ = quantize(
        network.build(), QuantSpec(weight_only=True, preset="fast", weight_groups=10), network.inputs(4)
    )
    parts = dict(module.named_buffers())
    assert parts["blocks.0.q.weight_scale"].shape == (16, 2)  # 16 features: groups of 8
    assert parts["blocks.0.down.weight_scale"].shape == (16, 3)  # 24 features: groups of 8
    with pytest.raises(CATValueError, match="weight_groups"):
        QuantSpec(weight_groups=4)
