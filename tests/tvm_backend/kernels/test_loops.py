"""Schedules of operators left in float: they compute the same, in vectors and by threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm
from tvm import te, tirx, topi

from tvm_backend.kernels.loops import scheduled
from tvm_backend.target import resolve


def _matmul(a, b):
    return topi.nn.matmul(a, b)


def _conv(a, b):
    return topi.nn.conv2d(a, b, 1, 1, 1)


def _torch(function):
    return lambda *arrays: function(*map(torch.from_numpy, arrays)).numpy()


# name: shapes, the operator, what it computes, whether it has vectors
CASES = {
    "sum-of-rows": ([(6, 5, 64)], lambda a: topi.sum(a, axis=-1), lambda a: a.sum(-1), True),
    "sum-of-few": ([(6, 5, 16)], lambda a: topi.sum(a, axis=-1), lambda a: a.sum(-1), False),
    "sum-of-images": ([(3, 8, 4, 16)], lambda a: topi.sum(a, axis=(2, 3)), lambda a: a.sum((2, 3)), False),
    "sum-channels-last": ([(3, 4, 4, 16)], lambda a: topi.sum(a, axis=(1, 2)), lambda a: a.sum((1, 2)), True),
    "max-of-rows": ([(7, 96)], lambda a: topi.max(a, axis=-1), lambda a: a.max(-1), True),
    "sum-of-all": ([(4, 12)], lambda a: topi.sum(a), lambda a: a.sum(), False),
    "odd": ([(5, 7)], lambda a: topi.nn.relu(a) + a, lambda a: np.maximum(a, 0) + a, False),
    "matmul": ([(9, 24), (24, 32)], _matmul, lambda a, b: a @ b, True),
    "conv2d": ([(2, 4, 16, 16), (8, 4, 3, 3)], _conv, _torch(lambda a, b: torch.conv2d(a, b, padding=1)), True),
    "softmax": ([(4, 8, 16)], lambda a: topi.nn.softmax(a, 1), _torch(lambda a: a.softmax(1)), True),
    "many": ([(64, 1024)], lambda a: a * a, lambda a: a * a, True),
    "transpose": ([(4, 16, 8)], lambda a: topi.transpose(a, (0, 2, 1)), lambda a: a.transpose(0, 2, 1), True),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_schedule_computes_the_same(name):
    shapes, operator, wanted, vectors = CASES[name]
    tensors = [te.placeholder(shape, name=f"x{i}", dtype="float32") for i, shape in enumerate(shapes)]
    result = operator(*tensors)
    function = scheduled(te.create_prim_func([*tensors, result]))
    text = function.script()
    assert function.attrs["tirx.is_scheduled"]
    assert ("T.vectorized" in text) == vectors
    assert ("T.parallel" in text) == (name in ("many", "conv2d"))
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    built = tvm.compile(module, target=next(iter(resolve("native").values())))
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
    out = tvm.runtime.tensor(np.zeros([int(size) for size in result.shape], np.float32))
    built.mod["main"](*map(tvm.runtime.tensor, arrays), out)
    np.testing.assert_allclose(out.numpy(), wanted(*arrays), rtol=1e-5, atol=1e-5)


def test_threads_share_a_batch_whose_size_is_not_known():
    for features, shared in ((64, False), (64 * 64, True)):
        x = te.placeholder((tirx.Var("n", "int64"), 2, features), name="x", dtype="float32")
        text = scheduled(te.create_prim_func([x, topi.tanh(x)])).script()
        assert ("T.parallel" in text) == shared
        assert "T.vectorized" in text


def test_what_is_shared_is_computed_once():
    gate, x = te.placeholder((4, 16), name="gate"), te.placeholder((4, 8, 16), name="x")
    sigmoid = topi.sigmoid(gate)
    result = te.compute((4, 8, 16), lambda n, p, c: x[n, p, c] * sigmoid[n, c])
    assert (
        scheduled(te.create_prim_func([gate, x, result])).script().count("T.sblock(") == 3
    )  # root, gate, result
    doubled = te.compute((4, 16), lambda n, c: gate[n, c] * 2.0)
    result = te.compute((4, 8, 16), lambda n, p, c: x[n, p, c] * doubled[n, c])
    assert scheduled(te.create_prim_func([gate, x, result])).script().count("T.sblock(") == 2


def test_other_forms_stay_as_they_are():
    x = te.placeholder((4, 16), name="x")
    out = te.extern((4, 16), [x], lambda ins, outs: tirx.call_packed("nothing", ins[0], outs[0]))
    function = te.create_prim_func([x, out])
    assert scheduled(function).script().count("T.vectorized") == 0


def test_functions_in_each_other_keep_their_values_apart():
    x = te.placeholder((4, 16), name="x", dtype="float32")

    def doubled_once(name, tensor):
        held = tirx.Var("held", "float32")
        return te.compute(tensor.shape, lambda *at: tirx.Let(held, tensor(*at), held * held), name=name)

    result = doubled_once("again", doubled_once("first", x))
    function = scheduled(te.create_prim_func([x, result])).with_attr("global_symbol", "main")
    assert function.script().count("T.sblock(") == 2  # one in the other
    built = tvm.compile(tvm.IRModule({"main": function}), target=next(iter(resolve("native").values())))
    data = np.arange(64, dtype=np.float32).reshape(4, 16) / 16
    out = tvm.runtime.tensor(np.zeros_like(data))
    built.mod["main"](tvm.runtime.tensor(data), out)
    np.testing.assert_array_equal(out.numpy(), data**4)
