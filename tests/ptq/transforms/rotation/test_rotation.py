"""Rotations: orthogonal, folded exactly, and good against outliers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from cat_plugin.equivalence import Equivalence
from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.graph.trace import trace
from cat_plugin.ptq.rows import Inputs
from cat_plugin.ptq.transforms.rotation.hadamard import factors_of, hadamard, mean_keeping, orthogonal
from cat_plugin.ptq.transforms.rotation.heads import Heads, Scores, find_heads, find_scores
from cat_plugin.ptq.transforms.rotation.online import FeedForward, find_feed_forwards
from cat_plugin.ptq.transforms.rotation.rotation import InnerRotation, Rotation
from cat_plugin.ptq.transforms.rotation.stream import ResidualStream, find_streams
from cat_plugin.ptq.transforms.rotation.turns import turns
from cat_plugin.ptq.transforms.smoothing.functions import insert_factors
from cat_plugin.ptq.transforms.smoothing.smoothing import Smoothing
from tests.zoo import ZOO


def traced(name: str):
    network = ZOO[name]
    model, inputs = network.build(), Inputs.of(network.inputs(4))
    return model, inputs, trace(model, inputs[:2])


@pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 20, 24, 28, 36, 64, 144, 576])
def test_hadamard_matrices_have_entries_of_one_size_and_orthogonal_rows(n):
    found = hadamard(n).numpy()
    assert np.array_equal(np.abs(found), np.ones((n, n)))
    assert np.array_equal(found @ found.T, n * np.eye(n))


@pytest.mark.parametrize("n", [3, 10, 24, 92])
def test_matrices_are_orthogonal_where_there_is_no_hadamard_matrix_as_well(n):
    assert (hadamard(n) is None) == (n != 24)
    found = orthogonal(n, torch.Generator().manual_seed(n)).numpy()
    np.testing.assert_allclose(found @ found.T, np.eye(n), atol=1e-12)
    assert not np.array_equal(found, orthogonal(n, torch.Generator().manual_seed(n + 1)).numpy())


@pytest.mark.parametrize("n", [2, 5, 24])
def test_matrices_for_layer_norms_keep_the_mean(n):
    found = mean_keeping(n, torch.Generator().manual_seed(n)).numpy()
    np.testing.assert_allclose(found @ found.T, np.eye(n), atol=1e-12)
    np.testing.assert_allclose(found.sum(0), np.ones(n), atol=1e-12)
    np.testing.assert_allclose(found.sum(1), np.ones(n), atol=1e-12)
    assert n < 3 or np.abs(found - np.eye(n)).max() > 0.3


def test_sizes_are_split_near_the_middle_into_those_of_hadamard_matrices():
    assert [factors_of(n) for n in (7, 16, 24)] == [(1, 7), (4, 4), (2, 12)]


def test_a_power_of_two_comes_last():
    found = {n: factors_of(n) for n in (64, 96, 576, 768, 1536, 5632)}
    assert found == {64: (4, 16), 96: (12, 8), 576: (36, 16), 768: (24, 32), 1536: (48, 32), 5632: (88, 64)}


def test_near_the_middle_comes_before_a_hadamard_matrix():
    """5504 rows have one, and would cost as many multiplications for each feature of Llama's feed-forward network."""
    assert hadamard(5504) is not None
    assert factors_of(11008) == (86, 128)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", [ResidualStream, Heads, Heads, FeedForward, FeedForward]),
        ("encoder", [Heads, Heads, FeedForward, FeedForward, FeedForward, Scores, Scores]),
        ("vit", [ResidualStream, Heads, Heads, FeedForward, FeedForward, Scores, Scores]),
        ("vit-mha", [ResidualStream, Heads, Heads, FeedForward, Scores, Scores]),
        ("mixer", [FeedForward, FeedForward]),
    ],
)
def test_places_of_whole_networks(name, expected):
    _, _, module = traced(name)
    found = [*Rotation().places(module), *InnerRotation().places(module)]
    assert [type(place) for place in found] == expected


@pytest.mark.parametrize("name", ["llama", "encoder", "vit", "vit-mha", "cct", "mixer"])
def test_every_rotation_leaves_the_function_as_it_is(name):
    model, inputs, module = traced(name)
    equivalence = Equivalence(model, inputs.call)
    before = {key: value.clone() for key, value in module.named_buffers()}
    for transform in (Rotation(), InnerRotation()):
        transform.fold(module, inputs, QuantSpec(rotation="online"), torch.Generator().manual_seed(0))
    equivalence.check("rotation", module, locate=False)
    assert any(not torch.equal(value, module.get_buffer(key)) for key, value in before.items())
    with torch.no_grad():
        given, wanted = module(*inputs.tensors), model(*inputs.tensors)
    assert float((given - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("name", ["llama", "vit"])
@pytest.mark.parametrize("behind_factors", [False, True])
def test_turns_foretell_what_layers_read_but_for_signs(name, behind_factors):
    """Orthogonal, alike for rows and weights, and of the size of what the layer reads; applied to both nothing changes."""
    _, _, module = traced(name)
    if behind_factors:
        insert_factors(module)
    found = turns(module, QuantSpec(rotation="online"))
    readers = [
        *(place.reader for place in find_heads(module)),
        *(p.layer for p in find_feed_forwards(module)),
    ]
    assert list(found) == readers
    assert len(turns(module, QuantSpec(rotation="folded"))) == len(find_heads(module))
    assert turns(module, QuantSpec()) == {}
    computed = {layer for layer, turn in found.items() if turn.computed}
    assert computed == {place.layer for place in find_feed_forwards(module)}
    for layer, turn in ((layer, turn.rotated) for layer, turn in found.items()):
        weight = module.get_buffer(str(layer.args[1].target))
        x = torch.randn(7, weight.shape[1], generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(turn(x) @ turn(weight).T, x @ weight.T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(turn(x).norm(dim=1), x.norm(dim=1))
        assert (turn(x) - x).abs().max() > 0.1


def with_large_channels(network: nn.Module) -> nn.Module:
    """One in eight channels behind GELU far larger than the others, and only in part read with smaller weights."""
    with torch.no_grad():
        for block in network.blocks:
            block.mlp[0].weight[::8] *= 60
            block.mlp[2].weight[:, ::8] /= 60**0.5
    return network


@pytest.mark.parametrize(("large", "granularity"), [(False, "tensor"), (True, "tensor"), (False, "token")])
def test_a_rotation_that_searched_scales_do_as_well_without_is_not_made(large, granularity):
    network = ZOO["vit"]
    model, inputs = network.build(), Inputs.of(network.inputs(32))
    module = trace(with_large_channels(model) if large else model, inputs[:2])
    before = len(find_feed_forwards(module))
    options = {"smoothing": "searched", "rotation": "online", "a_granularity": granularity}
    spec, made = QuantSpec(w_bits=4, a_bits=4, batch_size=32, **options), large or granularity == "token"
    weights = {name: value.clone() for name, value in module.named_buffers() if "patch" in name}
    Rotation().fold(module, inputs, spec, torch.Generator().manual_seed(0))
    Smoothing().fold(module, inputs, spec, torch.Generator().manual_seed(0))
    kept = [place for place in InnerRotation().places(module) if isinstance(place, FeedForward)]
    assert len(kept) == (before if made else 0)
    if not made:  # all channels of a stream of random weights are alike
        assert all(torch.equal(value, module.get_buffer(name)) for name, value in weights.items())


def test_channels_behind_gelu_lose_their_mean_before_they_are_rotated():
    """Behind a rotation a mean stands in every sum: the smoothing in front takes it away, and stays exact."""
    network = ZOO["vit"]
    model, inputs = with_large_channels(network.build()), Inputs.of(network.inputs(32))
    module = trace(model, inputs[:2])
    spec = QuantSpec(w_bits=4, a_bits=4, smoothing="searched", rotation="online", batch_size=32)
    equivalence = Equivalence(model, inputs.call)
    for transform in (Rotation(), Smoothing(), InnerRotation()):
        transform.fold(module, inputs, spec, torch.Generator().manual_seed(0))
    equivalence.check("both", module, locate=False)
    seen = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n):
            seen[n] = super().run_node(n)
            return seen[n]

    with torch.no_grad():
        Recorder(module).run(*inputs.tensors)
    functions = [node for node in module.graph.nodes if node.target == torch.ops.aten.addcmul.default]
    assert len(functions) == 2
    for node in functions:
        rows = seen[node].reshape(-1, seen[node].shape[-1])
        before = seen[node.args[1]].reshape(rows.shape)
        share = rows.mean(0).square().sum() / rows.square().mean(0).sum()
        assert share < 1e-3 < 0.1 * before.mean(0).square().sum() / before.square().mean(0).sum()
        (unflattened,) = node.users
        assert unflattened.target == torch.ops.aten.unflatten.int


def test_folds_are_those_of_the_formulas_in_double_precision():
    _, _, module = traced("llama")
    before = {key: value.double().numpy() for key, value in module.named_buffers()}
    generator = torch.Generator().manual_seed(0)
    (stream,), heads, gated = find_streams(module), find_heads(module), find_feed_forwards(module)
    r, small = orthogonal(16, generator), orthogonal(4, generator)
    a, b = orthogonal(2, generator), orthogonal(12, generator)
    with torch.no_grad():
        stream.rotate(module, r)
        heads[0].rotate(module, small)
        gated[0].rotate(module, a, b)

    def of(node, index=1):
        return getattr(module, str(node.args[index].target)).double().numpy()

    r, small, pair = r.numpy(), small.numpy(), torch.kron(a, b).numpy()
    gain = before["blocks_0_norm1_weight"]
    layer = next(n for n in stream.readers if str(n.args[1].target) == "blocks_0_q_weight")
    np.testing.assert_allclose(of(layer), before["blocks_0_q_weight"] * gain @ r, atol=1e-6)
    # the table is read by the embedding and by the output layer: each has its own from here on
    np.testing.assert_allclose(of(stream.makers[0].node, 0), before["embedding_weight"] @ r, atol=1e-6)
    head = next(n for n in stream.readers if "embedding" in str(n.args[1].target))
    np.testing.assert_allclose(of(head), before["embedding_weight"] * before["norm_weight"] @ r, atol=1e-6)
    rotated = np.kron(np.eye(2), small).T @ (before["blocks_0_v_weight"] * gain @ r)
    np.testing.assert_allclose(of(heads[0].values), rotated, atol=1e-6)
    expected = r.T @ before["blocks_0_o_weight"] @ np.kron(np.eye(4), small)
    np.testing.assert_allclose(of(heads[0].reader), expected, atol=1e-6)
    np.testing.assert_allclose(of(gated[0].layer), r.T @ before["blocks_0_down_weight"] @ pair, atol=1e-6)


class Tokens(nn.Module):
    """Patches, a class token and positions in front of layer norms, whose readers may lack biases, and whose rows are picked."""

    def __init__(self, bias=True, groups=1, pooled=False):
        super().__init__()
        self.patch = nn.Conv2d(4, 16, 2, 2, groups=groups)
        self.first, self.positions = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 10, 16))
        self.norms = nn.ModuleList([nn.LayerNorm(16), nn.LayerNorm(16)])
        self.up, self.down = nn.Linear(16, 32, bias=bias), nn.Linear(32, 16, bias=bias)
        self.head, self.pooled = nn.Linear(16, 5), pooled
        for norm in self.norms:
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.normal_(norm.bias)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1) + self.positions
        x = x + self.down(torch.relu(self.up(self.norms[0](x))))
        x = self.norms[1](x[:, 1:])
        return self.head(x.mean(1) if self.pooled else x[:, 0])


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"pooled": True}])
def test_streams_of_patches_behind_layer_norms_are_rotated_exactly(options):
    torch.manual_seed(0)
    model, x = Tokens(**options).eval(), torch.randn(3, 4, 6, 6)
    module = trace(model, x)
    (stream,) = find_streams(module)
    assert stream.centred
    assert len(stream.makers) == 4
    before = module.get_buffer("patch_weight").clone()
    with torch.no_grad():
        stream.rotate(module, mean_keeping(16, torch.Generator().manual_seed(0)))
        torch.testing.assert_close(module(x), model(x), rtol=1e-5, atol=1e-5)
        assert not torch.equal(module.get_buffer("patch_weight"), before)
        stream.rotate(module, orthogonal(16, torch.Generator().manual_seed(1)))
        assert (module(x) - model(x)).abs().max() > 0.01  # the norms subtract the mean


def test_outputs_of_groups_of_channels_are_not_mixed():
    assert find_streams(trace(Tokens(groups=2).eval(), torch.randn(3, 4, 6, 6))) == []


def test_queries_and_keys_are_rotated_alike_and_their_products_stay():
    model, inputs, module = traced("vit")
    (first, _) = find_scores(module)
    ((layer, rows),) = first.rows.items()
    before = module.get_buffer(str(layer.args[1].target)).clone()
    with torch.no_grad():
        first.rotate(module, orthogonal(first.size, torch.Generator().manual_seed(0)))
        torch.testing.assert_close(module(*inputs.tensors), model(*inputs.tensors), rtol=1e-5, atol=1e-5)
    moved = (module.get_buffer(str(layer.args[1].target)) != before).any(1).nonzero().flatten().tolist()
    assert moved == [row for start in sorted(rows) for row in range(start, start + first.size)]
    assert len(moved) == 2 * len(before) // 3  # of packed queries, keys and values


@pytest.mark.parametrize(("bits", "rotated"), [(8, False), (None, True)])
def test_queries_and_keys_are_rotated_once(bits, rotated):
    """Where attention is quantized that transform rotates them; a second Hadamard matrix can undo the first."""
    _, inputs, module = traced("vit")
    (place, _) = find_scores(module)
    ((layer, starts),) = place.rows.items()
    rows = torch.cat([torch.arange(start, start + place.size) for start in starts])
    before = module.get_buffer(str(layer.args[1].target))[rows]
    spec = QuantSpec(rotation="folded", attention_bits=bits)
    InnerRotation().fold(module, inputs, spec, torch.Generator().manual_seed(0))
    assert torch.equal(before, module.get_buffer(str(layer.args[1].target))[rows]) != rotated


def test_keys_that_something_else_reads_are_not_rotated():
    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            q, k = self.q(x), self.k(x)
            return (q @ (k * torch.linspace(0, 1, 8)).mT).softmax(-1)

    assert find_scores(trace(Rotary().eval(), torch.randn(2, 5, 8))) == []


def test_what_would_see_the_basis_keeps_a_stream_from_being_rotated():
    class Seen(nn.Module):
        def __init__(self, seen):
            super().__init__()
            self.embedding, self.norm, self.head = nn.Embedding(50, 16), nn.RMSNorm(16), nn.Linear(16, 5)
            self.seen = seen

        def forward(self, x):
            x = self.embedding(x)
            return self.head(self.norm(x)) + self.seen(x)

    for seen, streams in ((lambda x: x.abs().sum(-1, keepdim=True), 0), (nn.Linear(16, 5), 1)):
        module = trace(Seen(seen).eval(), Inputs.of(ZOO["llama"].inputs(2)))
        assert len(find_streams(module)) == streams


def test_outliers_of_single_channels_cost_less_once_they_are_rotated():
    network = ZOO["llama"]
    model, x = network.build(), network.inputs(32)
    with torch.no_grad():
        for block in model.blocks:  # as trained models have them
            block.norm1.weight[3] *= 40
            block.norm2.weight[5] *= 40
            for layer in (block.q, block.k, block.v):
                layer.weight[:, 3] /= 40
            for layer in (block.gate, block.up):
                layer.weight[:, 5] /= 40
            block.up.weight[7] *= 30
            block.down.weight[:, 7] /= 30
    errors = dict.fromkeys((None, "folded", "online"), 0.0)
    for rotation, seed in itertools.product(errors, range(3)):  # signs are drawn
        plain = {"compensation": False, "refit": False, "bias_correction": False, "a_granularity": "token"}
        spec = QuantSpec(
            w_bits=8, a_bits=4, preset="fast", rotation=rotation, batch_size=4, seed=seed, **plain
        )
        module, _ = quantize(model, spec, x)
        with torch.no_grad():
            errors[rotation] += float((module(x) - model(x)).norm())
    assert errors["folded"] < 0.8 * errors[None]
    assert errors["online"] < 0.95 * errors["folded"]


def test_products_with_constants_stay_as_they_are_where_attention_is_quantized():
    network = ZOO["llama"]
    spec = QuantSpec(preset="fast", a_granularity="token", rotation="online", attention_bits=8)
    module, report = quantize(network.build(), spec, network.inputs(4))
    products = [n for n in module.graph.nodes if str(n.target) == "aten.matmul.default"]
    assert len(products) == 4
    assert not any("dequantize" in str(source.target) for node in products for source in node.all_input_nodes)
    assert sum("a product with a constant" in text for text in report.unquantized) == 4
    assert isinstance(module, nn.Module)
