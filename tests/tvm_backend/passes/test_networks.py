"""The passes together: imported graphs become integer kernels that compute what torch computes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import cat_plugin.graph.op  # noqa: F401
from tests.tvm_backend import qdq_models as models
from tests.tvm_backend.interpreter import interpret
from tvm_backend import compat, dialect
from tvm_backend.importer import import_program
from tvm_backend.passes.pipeline import INTEGER_PASSES, integer_kernels


def symbolic(program):
    mod = import_program(program)
    for step in INTEGER_PASSES:
        mod = step(mod)
    return mod


def kinds(mod):
    calls = [dialect.match(expr) for expr in compat.bound_values(mod["main"])]
    return [type(c.attributes).__name__ if c.name == "kernel" else c.name for c in calls if c is not None]


def leftovers(mod):
    return [name for expr in compat.bound_values(mod["main"]) if (name := compat.op_name(expr))]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shortcut", ["identity", "pad", "conv"])
@pytest.mark.parametrize("quantize_branch", [False, True])
def test_residual_network_is_all_integers(bits, shortcut, quantize_branch):
    torch.manual_seed(bits)
    if shortcut == "identity":
        model = models.QResNet(bits, "pad", width=8)
        model.blocks = model.blocks[:1]
        model.fc = models.QLinear(torch.nn.Linear(8, 10), 8)
    else:
        model = models.QResNet(bits, shortcut, width=8, quantize_branch=quantize_branch)
    x = torch.randn(3, 3, 12, 12)
    mod = symbolic(models.exported(model, x))
    assert set(leftovers(mod)) <= {"call_pure_packed", "reshape"}
    expected = model(x).detach()
    error = (interpret(mod, x) - expected).abs().max()
    # The float convolution of torch and the exact sums round differently, which may move a value over the edge of a step.
    assert error < 0.05 * expected.abs().max()
    counted = kinds(mod)
    assert counted.count("QuantizeSpec") == 1
    assert counted[-1] == "cluster_affine"
    assert "ElementwiseSpec" not in counted


class _Tokens(torch.nn.Module):
    """Two layers on tokens with grids of their own, the first with groups of weights, and a shortcut around both."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("first", torch.randint(-8, 8, (12, 8), generator=generator, dtype=torch.int8))
        self.register_buffer("groups", torch.rand(12, 2, generator=generator) / 50)
        self.register_buffer("none", torch.zeros(12, 2, dtype=torch.int64))
        self.second = models.QWeight(torch.randn(8, 12, generator=generator), 4)

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        low, high = x.amin(-1, True).clamp(max=0.0) * 0.9, x.amax(-1, True).clamp(min=0.0) * 0.9
        scale = ((high - low) * (1.0 / 255)).clamp(min=1e-8)
        grid = (scale, (-low / scale).round().to(torch.int64), 0, 255, torch.uint8)
        return models.qd.dequantize_per_token(models.qd.quantize_per_token(x, *grid), *grid, torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid = (self.groups, self.none, -8, 7, torch.int8, 4, torch.float32)
        weight = models.qd.dequantize_per_channel_group(self.first, *grid)
        y = torch.relu(torch.nn.functional.linear(self.rounded(x), weight, self.groups[:, 0]))
        return x + torch.nn.functional.linear(self.rounded(y), self.second())


def test_tokens_with_their_own_grids_are_all_integers():
    model, x = _Tokens().eval(), torch.randn(6, 8) * torch.logspace(-1, 1, 6)[:, None]
    mod = symbolic(models.exported(model, x))
    assert kinds(mod) == ["TokensSpec", "GroupedLinearSpec"] * 2
    assert set(leftovers(mod)) <= {"call_pure_packed"}  # bias, ReLU and shortcut are in the epilogues
    expected = model(x)
    assert (interpret(mod, x) - expected).abs().max() < 0.02 * expected.abs().max()


def test_threads_may_compile_at_a_time():
    model = models.QResNet(8, "conv", width=8)
    mod = import_program(models.exported(model, torch.randn(3, 3, 12, 12)))
    with ThreadPoolExecutor(2) as pool:
        made = set(pool.map(lambda _: integer_kernels(mod).script(show_meta=False), range(4)))
    assert len(made) == 1
