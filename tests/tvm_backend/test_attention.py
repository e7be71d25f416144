"""Attention on a logarithmic grid, and channels scaled behind GELU: the library gives what its program gives."""

from __future__ import annotations

import numpy as np
import torch

import tvm_backend
from cat_plugin.graph.export import export_program
from cat_plugin.ptq import QuantSpec, quantize
from tests.zoo import ZOO
from tvm_backend.target import native


def test_a_vision_transformer_with_four_bit_attention_is_compiled(tmp_path):
    network = ZOO["vit"]
    model, inputs = network.build(), network.inputs(32)
    spec = QuantSpec(
        w_bits=4, a_bits=4, attention_bits=4, smoothing="searched", preset="fast", num_samples=32
    )
    quantized, _ = quantize(model, spec, inputs.split(16))
    program = export_program(quantized, inputs[:2])
    path = tmp_path / "model.so"
    tvm_backend.compile(program, target={**native(), "opt-level": 0}, out=path, cache=False)
    library, run = tvm_backend.load(path), program.module(check_guards=False)
    with torch.no_grad():
        expected = run(inputs[:5]).numpy()
    np.testing.assert_allclose(library(inputs[:5].numpy()), expected, atol=1e-5 * np.abs(expected).max())
