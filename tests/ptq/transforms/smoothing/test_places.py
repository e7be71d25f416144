"""Where channels may be scaled: found from the graph, in networks of every shape."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cat_plugin.equivalence import Equivalence
from cat_plugin.ptq.graph.fold import fold_batch_norm
from cat_plugin.ptq.graph.trace import trace
from cat_plugin.ptq.transforms.smoothing.fold import fold_place
from cat_plugin.ptq.transforms.smoothing.places import find_places
from tests.zoo import ZOO

# kind, number of scales, whether they may be shifted; per block, then behind the blocks
_VIT = [("norm", 16, True), ("product", 16, False), ("linear", 16, True), ("norm", 16, True)]
_LLAMA = [
    ("norm", 16, False),
    ("product", 4, False),
    ("linear", 8, False),
    ("norm", 16, False),
    ("linear", 24, False),
]
_SWIN = [("norm", 8, True), ("product", 8, False), ("linear", 8, True)]
EXPECTED = {
    "vit": [*_VIT, *_VIT, ("norm", 16, True)],
    "vit-mha": [*_VIT[:3], *_VIT],
    "cct": _VIT,
    "swin": [*_SWIN, *_SWIN, ("norm", 32, False), ("linear", 16, False)],
    "mixer": [("norm", 12, True), ("norm", 12, True)],
    "llama": [*_LLAMA, *_LLAMA, ("norm", 16, False)],
    "encoder": [*_VIT[1:3], *_VIT[1:3], ("norm", 16, True)],
    "lstm": [],
}  # fmt: skip


def traced(name: str):
    model, inputs = ZOO[name].build(), ZOO[name].inputs(4)
    module = trace(model, inputs)
    fold_batch_norm(module)
    return model, inputs, module


@pytest.mark.parametrize("name", EXPECTED)
def test_places_of_whole_networks(name):
    _, _, module = traced(name)
    found = [(place.kind, place.count, place.shifted) for place in find_places(module)]
    assert found == EXPECTED[name]


@pytest.mark.parametrize("name", [name for name, places in EXPECTED.items() if places])
def test_every_place_is_exact_for_scales_and_shifts_far_from_one_and_zero(name):
    model, inputs, module = traced(name)
    before = Equivalence(model, inputs)
    generator = torch.Generator().manual_seed(3)
    for place in find_places(module):
        untouched = {key: value.clone() for key, value in module.state_dict().items()}
        scales = torch.rand(place.count, generator=generator) * 4 + 0.25
        shifts = torch.randn(place.count, generator=generator) if place.shifted else None
        fold_place(module, place, scales, shifts)
        before.check(f"{place.kind} {place.sources[0].node}", module, locate=False)
        changed = [
            key for key, value in untouched.items() if not torch.equal(module.state_dict()[key], value)
        ]
        assert len(changed) >= len({s.node for s in (*place.sources, *place.readers)}) - place.kind.count(
            "norm"
        )


def test_heads_that_share_a_key_and_channels_that_turn_together_share_a_scale():
    """A key of the tiny Llama serves two heads, and rotary positions mix channels i and i + 2: 8 rows of k, 4 scales."""
    _, _, module = traced("llama")
    product = next(place for place in find_places(module) if place.kind == "product")
    (queries, keys) = product.sources
    assert queries.scales.unique(return_counts=True)[1].tolist() == [4] * 4
    assert keys.scales.unique(return_counts=True)[1].tolist() == [2] * 4
    assert set(queries.exponents.tolist()) | set(keys.exponents.tolist()) == {1, -1}
    assert len(set(queries.exponents.tolist())) == 1
    key_of = dict(zip(keys.channels.tolist(), keys.scales.tolist(), strict=True))
    for channel, scale in zip(queries.channels.tolist(), queries.scales.tolist(), strict=True):
        head, inside = divmod(channel, 4)
        assert key_of[head // 2 * 4 + inside] == scale
        assert key_of[head // 2 * 4 + (inside + 2) % 4] == scale


class _Between(nn.Module):
    """Two linear layers with a function between them; ``shared`` reads the first layer's outputs elsewhere as well."""

    def __init__(self, function, shared: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.function, self.shared = function, shared

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        z = self.down(self.function(y))
        if self.shared:
            z = z * y.mean(-1, keepdim=True)
        return self.head(F.silu(z))


@pytest.mark.parametrize(
    ("function", "shifted"),
    [(nn.ReLU(), False), (nn.LeakyReLU(0.1), False), (nn.Identity(), True), (lambda y: -2 * y / 3, False)],
)
def test_functions_that_commute_with_positive_scales(function, shifted):
    module = trace(_Between(function).eval(), torch.randn(2, 6))
    assert [(p.kind, p.count, p.shifted) for p in find_places(module)] == [("linear", 8, shifted)]


@pytest.mark.parametrize(
    "function",
    [nn.GELU(), nn.Tanh(), lambda y: y + 1, lambda y: y * y, lambda y: 1 / y, lambda y: y.softmax(-1),
     lambda y: F.pad(y, (1, -1)), lambda y: F.normalize(y), lambda y: y.cumsum(-1)],
)  # fmt: skip
def test_functions_that_do_not(function):
    places = find_places(trace(_Between(function).eval(), torch.randn(2, 6)))
    assert not [p for p in places if any(s.node.name == "linear" for s in p.sources)]


def test_channels_that_something_else_reads_stay():
    assert not find_places(trace(_Between(nn.ReLU(), shared=True).eval(), torch.randn(2, 6)))


class _Composed(nn.Module):
    """RMSNorm written out, as in models that bring their own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.first, self.second = (
            nn.Parameter(torch.rand(6) + 0.5),
            nn.Linear(6, 4),
            nn.Linear(6, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))
        return self.first(y) * F.silu(self.second(y))


def test_a_norm_that_is_written_out_is_found():
    model, x = _Composed().eval(), torch.randn(4, 5, 6)
    module = trace(model, x)
    (place,) = find_places(module)
    assert (place.kind, place.count, len(place.readers)) == ("norm", 6, 2)
    fold_place(module, place, torch.linspace(0.5, 5, 6))
    torch.testing.assert_close(module(x), model(x))


def test_the_fold_is_that_of_the_formula_in_double_precision():
    model, x = _Between(nn.Identity()).eval(), torch.randn(5, 6)
    module = trace(model, x)
    (place,) = find_places(module)
    s, z = torch.linspace(0.2, 4, 8).double(), torch.linspace(-1, 1, 8).double()
    fold_place(module, place, s, z)
    up, down = model.up, model.down
    expected = {
        "up_weight": up.weight.double() / s[:, None],
        "up_bias": (up.bias.double() - z) / s,
        "down_weight": down.weight.double() * s,
        "down_bias": down.bias.double() + down.weight.double() @ z,
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(module, name).double(), value, rtol=1e-6, atol=1e-6)


def test_a_weight_that_another_node_reads_is_left_to_it():
    model, inputs, module = traced("llama")
    embedding = module.embedding_weight.clone()
    last = find_places(module)[-1]
    fold_place(module, last, torch.linspace(0.3, 3, 16))
    assert torch.equal(module.embedding_weight, embedding)
    torch.testing.assert_close(module(inputs), model(inputs), rtol=1e-4, atol=1e-5)
