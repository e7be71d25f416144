"""Functions of float32 as vectors compute them, against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tvm
from tvm import relax

from tvm_backend import compat
from tvm_backend.passes.legalize_float import FUNCTIONS
from tvm_backend.passes.schedule_loops import ScheduleLoops
from tvm_backend.target import resolve

EDGES = [np.nan, np.inf, -np.inf, 0.0, 88.6, 88.8, 100.0, -86.9, -87.2, -200.0]


def _softmax(x):
    powers = np.exp(x - x.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def _normal(x):
    return np.vectorize(math.erfc)(-x / math.sqrt(2)) / 2


def _gelu_tanh(x):
    return x / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# name: the operator, what it approximates, how closely, and for numbers of which size
CASES = {
    "exp": (relax.op.exp, np.exp, 2.0**-21, 20),
    "sigmoid": (relax.op.sigmoid, lambda x: 1 / (1 + np.exp(-x)), 2.0**-21, 20),
    "tanh": (relax.op.tanh, np.tanh, 2.0**-22, 20),
    "gelu": (relax.op.nn.gelu, lambda x: x * _normal(x), 2.0**-21, 3),
    "gelu_tanh": (relax.op.nn.gelu_tanh, _gelu_tanh, 2.0**-21, 3),
    "softmax": (lambda x: relax.op.nn.softmax(x, 1), _softmax, 2.0**-19, 2),
}


def _run(operator, x):
    builder = relax.BlockBuilder()
    given = relax.Var("x", compat.tensor_type(x.shape, "float32"))
    with builder.function("main", [given]):
        with builder.dataflow():
            out = builder.emit_output(builder.emit(operator(given)))
        builder.emit_func_output(out)
    mod = ScheduleLoops().pass_(relax.transform.LegalizeOps(FUNCTIONS)(builder.finalize()))
    target = next(iter(resolve("native").values()))
    machine = relax.VirtualMachine(tvm.compile(mod, target=target), tvm.cpu())
    assert "T.vectorized" in mod.script()
    assert "T.exp(" not in mod.script()
    return machine["main"](tvm.runtime.tensor(x)).numpy()


@pytest.mark.parametrize("name", CASES)
def test_functions_are_close_to_float64(name):
    operator, exact, bound, spread = CASES[name]
    x = (np.random.default_rng(0).standard_normal((8, 32, 16)) * spread).astype(np.float32)
    found, wanted = _run(operator, x), exact(x.astype(float))
    scale = np.ones_like(wanted) if name == "tanh" else np.abs(x if "gelu" in name else wanted)
    usual = scale > 2.0**-120
    assert (np.abs(found - wanted)[usual] <= (bound * scale)[usual]).all()
    assert (np.abs(found - wanted)[~usual] < 2.0**-110).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", ["exp", "sigmoid", "tanh"])
def test_functions_at_their_edges(name):
    operator, exact, *_ = CASES[name]
    x = np.zeros((1, 16), np.float32)
    x[0, : len(EDGES)] = EDGES
    found, wanted = _run(operator, x), exact(x.astype(float)).astype(np.float32)
    assert np.isnan(found[0, 0])
    np.testing.assert_allclose(found[0, 1:], wanted[0, 1:], rtol=1e-6, atol=2.0**-110)
