"""The passes together: imported graphs become integer kernels that compute what torch computes."""

from __future__ import annotations

import pytest
import torch

import cat_plugin.graph.op  # noqa: F401
from tests.tvm_backend import qdq_models as models
from tests.tvm_backend.interpreter import interpret
from tvm_backend import compat, dialect
from tvm_backend.importer import import_program
from tvm_backend.passes.pipeline import INTEGER_PASSES


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
