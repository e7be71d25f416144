"""Activations in pieces are quantized as the function that they are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import cat_plugin

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from tests.graph.onnx.test_reading import file

TANH = [
    ("Mul", ["x", "x"], "square", {}), ("Mul", ["x", "square"], "cube", {}), ("Mul", ["k", "cube"], "small", {}),
    ("Add", ["small", "x"], "sum", {}), ("Mul", ["sum", "root"], "scaled", {}), ("Tanh", ["scaled"], "t", {}),
    ("Add", ["t", "one"], "both", {}), ("Mul", ["half", "both"], "share", {}), ("Mul", ["x", "share"], "y", {}),
]  # fmt: skip
NUMBERS = {
    "one": np.float32(1), "half": np.float32(0.5), "three": np.float32(3), "zero": np.float32(0), "six": np.float32(6),
    "k": np.float32(0.044715),
}  # fmt: skip


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
