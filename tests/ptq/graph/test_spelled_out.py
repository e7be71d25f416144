"""Functions in pieces become one operation; what only looks like one stays as it is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cat_plugin
from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.graph.trace import trace
from tests.ptq.models import small_inputs


class Spelled(nn.Module):
    """A function of an activation and of parameters `a` and `b`, between two layers, written out by hand."""

    def __init__(self, function, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function, self.first, self.last = function, nn.Linear(4, width), nn.Linear(width, 3)
        self.a, self.b = nn.Parameter(torch.rand(width) + 0.5), nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x), self.a, self.b))


def _moments(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    mean = x.mean(axis, keepdim=True)
    return mean, ((x - mean) ** 2).mean(axis, keepdim=True)


def _of_sums(x, a, b):
    mean = x.sum(-1, keepdim=True) * (1 / 6)
    scale = a * torch.rsqrt((x * x).sum(-1, keepdim=True) * (1 / 6) - mean * mean + 1e-3)
    return x * scale + (b - mean * scale)


def _of_reshaped(x, a, b):
    mean = x.mean(-1)
    variance = torch.clamp((x * x).mean(-1) - mean * mean, min=0)
    return (x - mean.unsqueeze(-1)) / (variance.unsqueeze(-1) + 1e-5).sqrt() * a + b


NORMS = {
    "layer norm": lambda x, a, b: (x - _moments(x, -1)[0]) / (_moments(x, -1)[1] + 1e-5).sqrt() * a + b,
    "of var": lambda x, a, b: a * (x - x.mean(-1, True)) / torch.sqrt(x.var(-1, False, True) + 1e-6) + b,
    "of sums": _of_sums,
    "reshaped": _of_reshaped,
    "without weights": lambda x, a, b: (x - x.mean(-1, True)) * (_moments(x, -1)[1] + 1e-5).rsqrt(),
}
OTHERS = {
    "rms norm": (lambda x, a, b: a * (x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-6)), "aten.rms_norm.default"),
    "softmax": (lambda x, a, b: (e := (x - x.amax(-1, True)).exp()) / e.sum(-1, keepdim=True), "aten.softmax.int"),
    "log softmax": (
        lambda x, a, b: (s := x - x.amax(-1, True)) - s.exp().sum(-1, keepdim=True).log(),
        "aten.log_softmax.int",
    ),
    "tanh gelu": (
        lambda x, a, b: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "aten.gelu.default",
    ),
    "gelu": (lambda x, a, b: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))), "aten.gelu.default"),
    "h-swish": (lambda x, a, b: x * F.relu6(x + 3) / 6, "aten.hardswish.default"),
    "h-swish, clipped late": (lambda x, a, b: x * (x / 6 + 0.5).clamp(0, 1), "aten.hardswish.default"),
    "h-sigmoid": (lambda x, a, b: F.hardtanh(x + 3, 0.0, 6.0) * (1 / 6), "aten.hardsigmoid.default"),
    "silu": (lambda x, a, b: x * torch.sigmoid(x), "aten.silu.default"),
    "sigmoid": (lambda x, a, b: 1 / (1 + torch.exp(-x)), "aten.sigmoid.default"),
    "mish": (lambda x, a, b: x * torch.tanh(F.softplus(x)), "aten.mish.default"),
}  # fmt: skip
FOUND = {name: (function, "aten.layer_norm.default") for name, function in NORMS.items()} | OTHERS


@pytest.mark.parametrize("name", FOUND)
def test_pieces_become_one(name: str) -> None:
    function, wanted = FOUND[name]
    model, x = Spelled(function).eval(), small_inputs(16, 5, 4) * 3
    traced = trace(model, x)
    called = [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]
    assert called == ["aten.linear.default", wanted, "aten.linear.default"]
    with torch.no_grad():
        torch.testing.assert_close(traced(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_norm_over_channels_in_front_stands_between_permutations() -> None:
    class ChannelsFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.a, self.b = (
                nn.Conv2d(3, 6, 3),
                nn.Parameter(torch.rand(6)),
                nn.Parameter(torch.rand(6)),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            mean, variance = _moments(x, 1)
            x = (x - mean) / torch.sqrt(variance + 1e-6)
            return (self.a[:, None, None] * x + self.b[:, None, None]).mean((2, 3))

    model, x = ChannelsFirst().eval(), small_inputs(8, 3, 7, 5)
    traced = trace(model, x)
    called = [str(node.target).split(".")[1] for node in traced.graph.nodes if node.op == "call_function"]
    assert called == ["conv2d", "permute", "layer_norm", "permute", "mean"]
    with torch.no_grad():
        torch.testing.assert_close(traced(x), model(x), rtol=1e-5, atol=1e-5)


NONE = {
    "another curve": lambda x, a, b: x * 0.5 * (1 + torch.erf(x / 1.3)),
    "by channel": lambda x, a, b: x * 0.5 * (1 + torch.erf(x / (math.sqrt(2) * torch.ones(6)))),
    "of two tensors": lambda x, a, b: x * torch.sigmoid(x.flip(-1)),
    "unbiased variance": lambda x, a, b: (x - x.mean(-1, True)) / (x.var(-1, True, True) + 1e-2).sqrt(),
    "of the deviation": lambda x, a, b: (x - x.mean(-1, True)) / (x.std(-1, True, True) + 1e-2),
    "another mean": lambda x, a, b: (x - x.mean(-2, True)) / (_moments(x, -1)[1] + 1e-5).sqrt(),
    "not to one": lambda x, a, b: (e := (x - x.amax(-1, True)).exp()) / (e.sum(-1, keepdim=True) + 1),
}  # fmt: skip


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_such_function_stays(name: str) -> None:
    model, x = Spelled(NONE[name]).eval(), small_inputs(16, 5, 4)
    traced = trace(model, x)
    names = {str(node.target) for node in traced.graph.nodes if node.op == "call_function"}
    assert not names & {wanted for _, wanted in FOUND.values()} - {"aten.sigmoid.default"}
    with torch.no_grad():
        torch.testing.assert_close(traced(x), model(x))


def test_what_is_read_elsewhere_is_kept() -> None:
    def function(x, a, b):
        gate = F.relu6(x + 3)
        return (x * gate / 6) * torch.tanh(gate)

    model, x = Spelled(function).eval(), small_inputs(16, 4)
    traced = trace(model, x)
    called = sorted(
        str(node.target).split(".")[1] for node in traced.graph.nodes if node.op == "call_function"
    )
    assert called == ["add", "hardswish", "linear", "linear", "mul", "relu6", "tanh"]
    with torch.no_grad():
        torch.testing.assert_close(traced(x), model(x))


def _quantized(name: str):
    model, x = Spelled(FOUND[name][0]).eval(), small_inputs(64, 4) * 3
    return quantize(model, QuantSpec(w_bits=8, a_bits=8, preset="fast", num_samples=64), x)[0], model, x


@pytest.mark.parametrize("name", ["of sums", "rms norm", "tanh gelu"])
def test_they_are_quantized_and_exported_as_one(name: str, tmp_path) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    quantized, model, x = _quantized(name)
    with torch.no_grad():
        expected, found = model(x), quantized(x)
    assert float((found - expected).norm() / expected.norm()) < 0.03
    cat_plugin.export_onnx(quantized, tmp_path / "model.onnx", x[:8])  # compares the file with the module


@pytest.mark.parametrize("name", ["of sums", "rms norm"])
def test_they_are_compiled(name: str, tmp_path) -> None:
    tvm_backend = pytest.importorskip("tvm_backend.build", reason="TVM is not installed")
    quantized, _, x = _quantized(name)
    bundle = cat_plugin.export_bundle(quantized, x[:8], tmp_path / "bundle")
    report = tvm_backend.compile(
        bundle, out=tmp_path / "model.so", cache=False
    )  # compares the library with the bundle
    assert [kernel.kind for kernel in report.kernels].count("linear") == 2


def _normed(y, axes=(-1,)):
    centred = y - y.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize(
    "function",
    [
        lambda y: torch.clamp(y * torch.sigmoid(y), max=20.0),
        lambda y: _normed(y).clamp(-3, 3),
        lambda y: _normed(y.clamp(-50, 50)),
        lambda y: (y.clamp(-30, 30).exp()) / y.clamp(-30, 30).exp().sum(-1, keepdim=True),
        lambda y: y.exp() / (y.exp().sum(-1, keepdim=True) + 1e-6),
        lambda y: y / (y.square().sum(-1, keepdim=True).sqrt() + 1e-8),
        lambda y: y / y.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12),
        lambda y: (y - y.mean(-1, keepdim=True)) / (y.std(-1, keepdim=True, correction=0) + 1e-8),
    ],
    ids=[
        "clipped silu", "clipped norm", "norm of clipped", "softmax of clipped", "softmax with epsilon",
        "length with epsilon", "length with bound", "deviation with epsilon",
    ],
)  # fmt: skip
def test_bounds_and_epsilons_act_where_calibration_does_not_reach(function) -> None:
    class Pieces(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(16, 16, bias=False)

        def forward(self, x):
            return function(self.fc(x))

    model, x = Pieces().eval(), small_inputs(4, 16)
    torch.nn.init.eye_(model.fc.weight)
    odd = torch.cat([x * 40, torch.eye(16) * 1e4, torch.zeros(1, 16), torch.full((1, 16), 2.0)])
    if function(odd).isnan().any():
        odd = torch.cat([x * 20, x - 60])  # what is no number in the model may be one in the graph
    with torch.no_grad():
        torch.testing.assert_close(trace(model, x)(odd), model(odd), rtol=1e-4, atol=1e-4)
