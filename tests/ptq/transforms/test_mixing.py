"""Channels of linear streams mixed: exact in full precision, and less noise when rounded."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.graph.ops import WEIGHTED, is_call, weight_of
from cat_plugin.ptq.graph.trace import trace
from cat_plugin.ptq.quantizers.observers import search_activation_range, search_weight_range
from cat_plugin.ptq.rows import Rows
from cat_plugin.ptq.transforms.channels import mixing
from cat_plugin.ptq.transforms.channels.mixing import Maker, Reader, balancing, mixing_matrix
from cat_plugin.ptq.transforms.channels.places import find_linear_streams
from cat_plugin.ptq.transforms.channels.sampler import ChannelSampler
from cat_plugin.ptq.transforms.equalization import Ceiling, Equalization
from tests.ptq.models import randomise, small_inputs


class InvertedResidual(nn.Module):
    """Expanding, depthwise and projecting layer beside a shortcut."""

    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__()
        inner = 3 * width
        self.expand, self.project = nn.Conv2d(width, inner, 1, bias=bias), nn.Conv2d(inner, width, 1)
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.project(F.relu(self.depthwise(F.relu(self.expand(x)))))


class Bottlenecks(nn.Module):
    """A stream that three layers make and three read, and one that a layer makes and one reads."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.narrow = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, width, 1)
        self.blocks = nn.Sequential(InvertedResidual(width), InvertedResidual(width))
        self.wide, self.small = nn.Conv2d(width, 20, 1), nn.Conv2d(20, 6, 1)
        self.last, self.fc = nn.Conv2d(6, 24, 1), nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.blocks(self.narrow(F.relu(self.stem(x))))
        y = self.last(self.small(F.relu(self.wide(y))))
        return self.fc(F.relu(y).mean((2, 3)))


def _layers(module: fx.GraphModule) -> dict[str, fx.Node]:
    return {
        str(n.args[1].target).removesuffix("_weight").replace("_", "."): n
        for n in module.graph.nodes
        if is_call(n, WEIGHTED)
    }


def test_streams_are_what_dense_layers_make_and_read_with_nothing_but_sums_between():
    module = trace(randomise(Bottlenecks()), small_inputs(2, 3, 8, 8))
    layers = {node: name for name, node in _layers(module).items()}
    found = [
        (stream.width, {layers[n] for n in stream.makers}, {layers[n] for n in stream.readers})
        for stream in find_linear_streams(module)
    ]
    assert found == [
        (
            8,
            {"narrow", "blocks.0.project", "blocks.1.project"},
            {"blocks.0.expand", "blocks.1.expand", "wide"},
        ),
        (6, {"small"}, {"last"}),
    ]


class Stopped(nn.Module):
    """One stream that ``how`` keeps from being mixed."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1, bias=how != "no bias")
        self.c = nn.Conv2d(4, 5, 1, padding=int(how == "padding"))
        self.wide, self.shift = nn.Conv2d(4, 5, 3), nn.Parameter(torch.ones(1, 4, 1, 1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.a(x)
        if self.how == "function":
            y = F.relu(y)
        elif self.how == "input":
            y = y + F.pad(x, (0, 0, 0, 0, 0, 1))
        elif self.how == "constant":
            y = y + self.shift
        elif self.how == "twice":
            y = y + self.a(x * 2)
        elif self.how == "joined":
            y = torch.cat([y[:, :2], y[:, 2:]], 1)
        second = self.wide(y) if self.how == "window" else self.c(y)
        return self.b(y), y if self.how == "result" else second


@pytest.mark.parametrize(
    ("how", "streams"),
    [
        ("nothing", 1),
        *((how, 0) for how in ("function", "input", "constant", "twice", "joined", "window", "padding")),
        *((how, 0) for how in ("result", "no bias")),
    ],
)
def test_whatever_else_touches_a_stream_leaves_it_alone(how, streams):
    module = trace(randomise(Stopped(how)), small_inputs(2, 3, 6, 6))
    assert len(find_linear_streams(module)) == streams


def _folded(model, x, **options):
    module = trace(model, x)
    before = {name: weight_of(module, n).clone() for name, n in _layers(module).items()}
    spec = QuantSpec(**{"w_bits": 4, "a_bits": 4, "batch_size": 16, **options})
    finish = Equalization().fold(module, Rows([x]), spec, torch.Generator().manual_seed(0))
    after = {name: weight_of(module, n) for name, n in _layers(module).items()}
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    return module, changed, finish


def _uneven_bottlenecks() -> nn.Module:
    model = randomise(Bottlenecks())
    scale = torch.logspace(-0.5, 0.5, 8).reshape(-1, 1, 1, 1)
    for layer in (model.narrow, *(block.project for block in model.blocks)):
        layer.weight.data *= scale
        layer.bias.data += 1.0
    return model


def test_mixing_leaves_the_function_as_it_is():
    model, x = _uneven_bottlenecks(), small_inputs(48, 3, 8, 8)
    module, changed, finish = _folded(model, x)
    assert {"narrow", "blocks.0.project", "blocks.0.expand", "blocks.1.expand", "wide", "last"} <= changed
    assert finish is None  # nothing is scaled in front of depthwise layers, which read 8 bits
    with torch.no_grad():
        torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-5)
    # means are in the biases
    inside = fx.Interpreter(module, garbage_collect_values=False)
    inside.run(x)
    for name in ("narrow", "blocks.0.project"):
        made = inside.env[_layers(module)[name]]
        assert float(made.mean((0, 2, 3)).abs().max()) < 1e-4 * float(made.abs().max())


def test_linear_layers_are_mixed_along_their_last_axis():
    model = randomise(nn.Sequential(nn.Linear(10, 6), nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3)))
    x = small_inputs(64, 7, 10)
    module, changed, _ = _folded(model, x, equalization=True)
    assert {"0", "1"} <= changed
    with torch.no_grad():
        torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-5)


def test_8_bit_activations_leave_the_streams_to_few_bit_weights_and_8_bits_leave_them_alone():
    model, x = _uneven_bottlenecks(), small_inputs(48, 3, 8, 8)
    assert "blocks.0.expand" in _folded(model, x, a_bits=8)[1]
    assert not _folded(model, x, w_bits=8, a_bits=8)[1]
    eight = {
        f"{name}*": {"w_bits": 8, "a_bits": 8} for name in ("blocks.0.expand", "blocks.1.expand", "wide")
    }
    assert "blocks.0.expand" not in _folded(model, x, overrides=eight)[1]
    assert not Equalization().applies(trace(model, x), QuantSpec(w_bits=4, weight_only=True))


def test_the_balancing_matrix_has_the_least_product_of_traces():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(6, 6)) @ np.diag([1, 2, 3, 5, 8, 13]) for _ in range(2))
    covariance, gram = a @ a.T, b @ b.T
    m = balancing(torch.from_numpy(covariance), torch.from_numpy(gram)).numpy()
    inverse = np.linalg.inv(m)
    np.testing.assert_allclose(m @ covariance @ m.T, inverse.T @ gram @ inverse, rtol=1e-6)

    def product(m):
        inverse = np.linalg.inv(m)
        return np.trace(m @ covariance @ m.T) * np.trace(inverse.T @ gram @ inverse)

    # (tr (S^1/2 G S^1/2)^1/2)^2 is the bound
    vectors = np.linalg.eigh(covariance)
    root = vectors[1] @ np.diag(np.sqrt(vectors[0])) @ vectors[1].T
    bound = np.sqrt(np.linalg.eigvalsh(root @ gram @ root)).sum() ** 2
    assert product(m) == pytest.approx(bound, rel=1e-6)
    assert all(product(m + 0.05 * rng.normal(size=m.shape)) > bound for _ in range(20))


def _channels(count: int, seed: int) -> torch.Tensor:
    """(count, 16) correlated, with few large values, about means of their own."""
    generator = torch.Generator().manual_seed(seed)
    sparse = torch.randn(count, 16, generator=generator) ** 3 * torch.logspace(0, -1, 16)
    basis = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(9)))[0]
    return sparse @ (0.5 * basis + 0.5 * torch.eye(16)) + torch.linspace(-1, 1, 16)


def _rounded(x: np.ndarray, bits: int) -> np.ndarray:
    step, zero, signed = search_activation_range(torch.from_numpy(x).float(), bits, False)
    low = -(2 ** (bits - 1)) if signed else 0
    return (np.clip(np.round(x / step) + zero, low, low + 2**bits - 1) - zero) * step


def _output_error(matrix, x, weight, bias, w_bits, a_bits):
    """Mean squared error behind ReLU with inputs and weights rounded for real, in float64, over the variance."""
    centred = x - x.mean(0)
    mixed, inner = centred @ matrix.T, weight @ np.linalg.inv(matrix)
    scale, zero = (
        v.double().numpy()[:, None]
        for v in search_weight_range(torch.from_numpy(inner).float(), w_bits, False)
    )
    low = -(2 ** (w_bits - 1))
    integers = np.clip(np.round(inner / scale) + zero, low, low + 2**w_bits - 1)
    shift = weight @ x.mean(0) + bias
    found = np.maximum(_rounded(mixed, a_bits) @ ((integers - zero) * scale).T + shift, 0)
    wanted = np.maximum(x @ weight.T + bias, 0)
    error = found - wanted
    return ((error - error.mean(0)) ** 2).sum() / ((wanted - wanted.mean(0)) ** 2).sum()


@pytest.mark.parametrize(("w_bits", "a_bits", "most"), [(8, 4, 0.7), (4, 8, 0.9), (4, 4, 0.75)])
def test_rounding_errs_less_in_mixed_channels_of_other_inputs(w_bits, a_bits, most):
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(48, 16, generator=generator) * torch.logspace(-0.4, 0.4, 16), torch.zeros(48)
    reader = Reader(_channels(4096, 2), weight, bias, w_bits, a_bits, math.inf)
    maker = Maker(torch.randn(16, 30, generator=generator), 30.0, w_bits)
    matrix = mixing_matrix([reader], [maker], torch.Generator().manual_seed(0)).numpy()
    other = [
        _channels(4096, 3).double().numpy(),
        weight.double().numpy(),
        bias.double().numpy(),
        w_bits,
        a_bits,
    ]
    assert _output_error(matrix, *other) < most * _output_error(np.eye(16), *other)


def test_a_matrix_that_is_no_better_on_other_samples_is_not_taken(monkeypatch):
    reader = Reader(_channels(2048, 2), torch.randn(20, 16), torch.zeros(20), 4, 4, 6.0)
    bad = torch.diag(torch.logspace(0, 4, 16, dtype=torch.float64))
    monkeypatch.setattr(mixing, "_balanced", lambda *_: bad)
    for found in (bad, torch.full_like(bad, torch.nan), torch.zeros_like(bad)):
        monkeypatch.setattr(mixing, "_descended", lambda *_, found=found: found)
        assert torch.equal(mixing_matrix([reader], [], torch.Generator()), torch.eye(16, dtype=torch.float64))


def test_a_stream_that_holds_a_constant_is_left_alone():
    reader = Reader(torch.ones(64, 3), torch.randn(5, 3), torch.zeros(5), 4, 4, math.inf)
    assert torch.equal(mixing_matrix([reader], [], torch.Generator()), torch.eye(3, dtype=torch.float64))


def test_moments_are_those_of_all_positions_however_many_rows_run_at_a_time():
    x = small_inputs(7, 3, 8, 8)
    module = trace(randomise(Bottlenecks()), x)
    node = _layers(module)["narrow"]
    inside = fx.Interpreter(module, garbage_collect_values=False)
    inside.run(x)
    values = inside.env[node].double().numpy()
    for piece in (7, 2):
        sampler = ChannelSampler(module, set(), 8, torch.Generator(), {node})
        sampler.run_batch(Rows([x]), piece)
        np.testing.assert_allclose(sampler.means(node).numpy(), values.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(sampler.mean_squares(node).numpy(), (values**2).mean((0, 2, 3)), rtol=1e-5)


def test_a_network_of_bottlenecks_is_nearer_to_full_precision_with_them_mixed():
    model, x, other = _uneven_bottlenecks(), small_inputs(96, 3, 8, 8), small_inputs(64, 3, 8, 8, seed=5)
    errors = []
    for asked in (False, None):
        module, _ = quantize(
            model, QuantSpec(w_bits=4, a_bits=4, preset="fast", batch_size=16, equalization=asked), x
        )
        assert not any(isinstance(child, Ceiling) for child in module.modules())
        with torch.no_grad():
            errors.append(float((module(other) - model(other)).square().mean() / model(other).var()))
    assert errors[1] < 0.8 * errors[0]
