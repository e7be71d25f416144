"""A model transformed for others to round: the same function and the same modules, with other parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from cat_plugin.errors import CATTypeError, CATValueError
from cat_plugin.ptq import QuantSpec, transform
from tests.zoo import ZOO


def _changed(before: nn.Module, after: nn.Module) -> set[str]:
    old = before.state_dict()
    return {name for name, value in after.state_dict().items() if not torch.equal(value, old[name])}


@pytest.mark.parametrize("name", ["vit", "encoder", "llama"])
def test_channels_are_scaled_in_the_callers_own_modules(name):
    network = ZOO[name]
    model, inputs = network.build(), network.inputs(8)
    kept = copy.deepcopy(model.state_dict())
    found = transform(model, QuantSpec(smoothing="searched", weight_only=True), inputs)
    assert type(found) is type(model)
    with torch.no_grad():
        torch.testing.assert_close(found(inputs), model(inputs), rtol=1e-3, atol=1e-3)
    changed = _changed(model, found)
    assert any("norm" in each for each in changed)
    assert all(torch.equal(value, kept[each]) for each, value in model.state_dict().items())


def test_norms_written_out_by_hand_have_their_parameters_too():
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(0.5, 8, 16))

        def forward(self, x):
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    torch.manual_seed(0)
    model = nn.Sequential(Root(), nn.Linear(16, 8)).eval()
    inputs = torch.randn(32, 16)
    found = transform(model, QuantSpec(smoothing="smoothquant", weight_only=True), inputs)
    assert _changed(model, found) == {"0.weight", "1.weight"}


class _Tied(nn.Module):
    """One matrix as embedding and output layer, by a second module or by a call of a function."""

    def __init__(self, module: bool) -> None:
        super().__init__()
        self.embedding, self.norm1, self.norm2 = nn.Embedding(20, 16), nn.RMSNorm(16), nn.RMSNorm(16)
        nn.init.uniform_(self.norm2.weight, 0.5, 2)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 20, bias=False) if module else None
        if self.head is not None:
            self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids)
        x = self.norm2(x + self.down(torch.relu(self.up(self.norm1(x)))))
        return nn.functional.linear(x, self.embedding.weight) if self.head is None else self.head(x)


def test_trained_and_rotated_where_modules_share_a_parameter():
    torch.manual_seed(0)
    model, inputs = _Tied(module=True).eval(), torch.randint(20, (16, 6))
    spec = QuantSpec(rotation="folded", smoothing="lrquant", smoothing_epochs=1, weight_only=True)
    found = transform(model, spec, inputs)
    assert {"embedding.weight", "head.weight", "up.weight"} <= _changed(model, found)
    assert found.head.weight is not found.embedding.weight
    with torch.no_grad():
        torch.testing.assert_close(found(inputs), model(inputs), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither smoothing nor rotation is given"),
        ({"rotation": "online"}, "adds products to the network"),
        ({"smoothing": "flatquant"}, "'flatquant', which adds products"),
        ({"rotation": "folded"}, "is used in two places"),
    ],
)
def test_what_is_no_change_of_parameters_is_refused(options, message):
    torch.manual_seed(0)
    with pytest.raises(CATValueError, match=message):
        transform(_Tied(module=False).eval(), QuantSpec(**options), torch.randint(20, (4, 6)))


def test_a_specification_is_wanted():
    with pytest.raises(CATTypeError, match="expected a QuantSpec"):
        transform(_Tied(module=False), {"smoothing": "searched"}, torch.randint(20, (4, 6)))
