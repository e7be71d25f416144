"""One layer rounded at a time, against the same done by hand on the eager model."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cat_plugin.ptq import QuantSpec, sensitivity
from cat_plugin.ptq.quantizers.observers import search_activation_range, search_weight_range
from cat_plugin.ptq.sensitivity_analysis import rows_for
from tests.zoo import ZOO


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5)).eval()


def _divergence(z: Tensor, reference: Tensor) -> float:
    p = reference.double().softmax(1)
    return float((p * (reference.double().log_softmax(1) - z.double().log_softmax(1))).sum(1).mean())


@torch.no_grad()
def test_it_is_what_rounding_one_layer_by_hand_does() -> None:
    model, x = _network(), torch.randn(64, 6)
    found = sensitivity(
        model, QuantSpec(w_bits=3, a_bits=3, first_bits=None, last_bits=None), [x], blocks=False
    )
    assert [each.name for each in found] == ["0", "2", "4"]
    reference = model(x)
    middle = copy.deepcopy(model)
    scale, zero = search_weight_range(model[2].weight, 3, symmetric=False)
    integers = ((model[2].weight / scale[:, None]).round() + zero[:, None]).clamp(-4, 3)
    middle[2].weight.copy_((integers - zero[:, None]) * scale[:, None])
    hidden = model[1](model[0](x))
    grid, offset, signed = search_activation_range(hidden.reshape(-1), 3, symmetric=False)
    assert not signed
    rounded = ((hidden / grid).round() + offset).clamp(0, 7)
    hidden_rounded = (rounded - offset) * grid
    assert found[1].weight_divergence == pytest.approx(_divergence(middle(x), reference), rel=1e-3, abs=1e-7)
    assert found[1].input_divergence == pytest.approx(
        _divergence(model[2:](hidden_rounded), reference), rel=1e-3, abs=1e-7
    )
    both = middle[2:](hidden_rounded)
    assert found[1].divergence == pytest.approx(_divergence(both, reference), rel=1e-3, abs=1e-7)
    assert found[1].changed == float((both.argmax(1) != reference.argmax(1)).float().mean())
    assert (found[1].kind, found[1].w_bits, found[1].a_bits, found[1].weights) == ("linear", 3, 3, 64)


@pytest.mark.parametrize("name", ["se-resnet", "vit"])
def test_blocks_follow_and_fewer_bits_hurt_more(name: str) -> None:
    network = ZOO[name]
    model, inputs = network.build(), network.inputs(24)
    fine, coarse = (
        sensitivity(model, QuantSpec(w_bits=bits, a_bits=bits, batch_size=16), inputs.split(10))
        for bits in (8, 2)
    )
    assert [each.name for each in fine] == [each.name for each in coarse]
    blocks = [each for each in coarse if each.kind == "block"]
    assert blocks
    assert sum(each.divergence for each in coarse) > 10 * sum(each.divergence for each in fine)


def test_exceptions_of_the_specification_hold() -> None:
    spec = QuantSpec(w_bits=2, a_bits=2, overrides={"2": {"w_bits": 6, "a_bits": 5}}, skip=["4"])
    found = sensitivity(_network(), spec, torch.randn(16, 6))
    assert [(each.name, each.w_bits, each.a_bits) for each in found] == [("0", 8, 8), ("2", 6, 5)]


def test_how_many_rows() -> None:
    assert rows_for(torch.empty(4096, 3, 32, 32)) == 128
    assert rows_for(torch.empty(64, 3, 224, 224)) == 27
    assert rows_for(torch.empty(5, 10)) == 5


def test_the_model_is_left_as_it_was() -> None:
    model = _network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match="training mode"):
        sensitivity(model.train(), QuantSpec(), torch.randn(16, 6))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert F.mse_loss(model(torch.ones(1, 6)), model(torch.ones(1, 6))) == 0
