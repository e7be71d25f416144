"""Activations in pieces become one operator; what only looks like one stays as it is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import cat_plugin

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from tests.graph.onnx.test_reading import file


def steps(tmp_path, nodes, constants, opset=13):
    module = cat_plugin.load_onnx(file(tmp_path, nodes, constants, ["n", 6], opset=opset))
    return [step.op for step in module._steps], module


TANH = [
    ("Mul", ["x", "x"], "square", {}), ("Mul", ["x", "square"], "cube", {}), ("Mul", ["k", "cube"], "small", {}),
    ("Add", ["small", "x"], "sum", {}), ("Mul", ["sum", "root"], "scaled", {}), ("Tanh", ["scaled"], "t", {}),
    ("Add", ["t", "one"], "both", {}), ("Mul", ["half", "both"], "share", {}), ("Mul", ["x", "share"], "y", {}),
]  # fmt: skip
ERF = [
    ("Div", ["x", "root"], "d", {}), ("Erf", ["d"], "e", {}), ("Add", ["e", "one"], "a", {}), ("Mul", ["x", "a"], "m", {}),
    ("Mul", ["m", "half"], "y", {}),
]  # fmt: skip
HARD = [
    ("Add", ["x", "three"], "a", {}), ("Clip", ["a", "zero", "six"], "c", {}), ("Div", ["c", "six"], "s", {}),
    ("Mul", ["s", "x"], "y", {}),
]  # fmt: skip
NUMBERS = {
    "one": np.float32(1), "half": np.float32(0.5), "three": np.float32(3), "zero": np.float32(0), "six": np.float32(6),
    "k": np.float32(0.044715),
}  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "root", "expected"),
    [
        (TANH, math.sqrt(2 / math.pi), "Gelu"), (ERF, math.sqrt(2), "Gelu"), (HARD, 0, "HardSwish"),
        (HARD[:3], 0, "HardSigmoid"),
    ],
)  # fmt: skip
def test_pieces_become_one(tmp_path, nodes, root, expected):
    constants = {**NUMBERS, "root": np.float32(root)}
    found, module = steps(tmp_path, nodes, constants)  # and equal to ONNX Runtime, or it were an error
    assert found == [expected]
    x = torch.linspace(-4, 4, 12).reshape(2, 6)
    if nodes is TANH:
        assert torch.allclose(module(x), torch.nn.functional.gelu(x, approximate="tanh"), atol=1e-6)


def test_what_is_no_activation_stays(tmp_path):
    constants = {**NUMBERS, "root": np.float32(1.3)}  # another curve
    assert len(steps(tmp_path, ERF, constants)[0]) == len(ERF)
    by_channel = {**NUMBERS, "root": np.full(6, math.sqrt(2), np.float32)}
    assert len(steps(tmp_path, ERF, by_channel)[0]) == len(ERF)


def test_what_is_read_elsewhere_is_kept(tmp_path):
    nodes = [*HARD[:3], ("Mul", ["s", "x"], "h", {}), ("Tanh", ["c"], "t", {}), ("Mul", ["h", "t"], "y", {})]
    found, _ = steps(tmp_path, nodes, NUMBERS)
    assert sorted(found) == ["Add", "Clip", "HardSwish", "Mul", "Tanh"]


def test_a_gelu_behind_a_layer_is_quantized_as_one(tmp_path):
    from cat_plugin.ptq import QuantSpec, quantize

    rng = np.random.default_rng(0)
    behind = [
        (op, ["h" if name == "x" else name for name in inputs], out, rest) for op, inputs, out, rest in TANH
    ]
    behind[-1] = ("Mul", ["h", "share"], "g", {})
    nodes = [("Gemm", ["x", "w"], "h", {}), *behind, ("Gemm", ["g", "v"], "y", {})]
    constants = {
        **NUMBERS, "root": np.float32(math.sqrt(2 / math.pi)), "w": 8 * rng.standard_normal((6, 8)).astype(np.float32),
        "v": rng.standard_normal((8, 3)).astype(np.float32),
    }  # fmt: skip
    module = cat_plugin.load_onnx(file(tmp_path, nodes, constants, ["n", 6]))
    x = torch.from_numpy(rng.standard_normal((64, 6)).astype(np.float32))
    quantized, _ = quantize(module, QuantSpec(w_bits=8, a_bits=8, preset="fast", batch_size=16), x)
    with torch.no_grad():
        expected = module(x)
        assert float((quantized(x) - expected).norm() / expected.norm()) < 0.03
