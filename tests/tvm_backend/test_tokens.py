"""Grids of tokens and of groups of weights in compiled libraries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("tvm")

import tvm_backend
from cat_plugin.cli import main
from cat_plugin.errors import CompileError, LibraryError
from cat_plugin.graph.bundle import export_bundle
from cat_plugin.graph.export import export_program
from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.torch_compat import register_quantized_decomposed
from tests.zoo import ZOO

register_quantized_decomposed()
_qd = torch.ops.quantized_decomposed


class _Rounded(nn.Module):
    """Tokens on grids of 4 bits, and a weight with groups added to them: nothing that is summed in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randint(-4, 4, (3, 16), generator=generator, dtype=torch.int8))
        self.register_buffer("scale", torch.rand(3, 2, generator=generator) + 0.1)
        self.register_buffer("zero", torch.randint(-4, 4, (3, 2), generator=generator))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = x.amin(-1, True).clamp(max=0.0), x.amax(-1, True).clamp(min=0.0)
        scale = ((high - low) * (1.0 / 15)).clamp(min=1e-8)
        grid = (scale, (-low / scale).round().to(torch.int64), 0, 15, torch.uint8)
        y = _qd.dequantize_per_token(_qd.quantize_per_token(x, *grid), *grid, torch.float32)
        grid = (self.scale, self.zero, -4, 3, torch.int8, 8, torch.float32)
        return y, x * 0 + _qd.dequantize_per_channel_group(self.weight, *grid)


def test_both_grids_are_torchs_to_the_bit(tmp_path, caplog):
    module, x = _Rounded().eval(), torch.randn(5, 3, 16) * torch.logspace(-3, 3, 3).reshape(1, 3, 1)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    tvm_backend.compile(program, out=tmp_path / "model.so")
    assert "1 layers with weights in groups" in caplog.text  # it is added, not multiplied
    found = tvm_backend.load(tmp_path / "model.so")(x.numpy())
    for mine, expected in zip(found, module(x), strict=True):
        np.testing.assert_array_equal(np.asarray(mine), expected.numpy())


@pytest.mark.parametrize(
    "options",
    [
        {"weight_only": True, "w_bits": 3, "weight_groups": 8},
        {"a_granularity": "token", "a_bits": 4, "attention_bits": 8, "rotation": "online"},
        {"a_granularity": "token", "w_bits": 4, "a_bits": 8, "weight_groups": 8},
        {"w_bits": 4, "a_bits": 8, "weight_groups": 8},
    ],
)
def test_a_language_model_with_them_is_compiled_to_integer_weights(tmp_path, caplog, options):
    network = ZOO["llama"]
    x = network.inputs(8)
    module, _ = quantize(network.build(), QuantSpec(preset="fast", **options), x)
    program = export_program(module, x[:2])
    report = tvm_backend.compile(program, out=tmp_path / "model.so")
    layers = sum("dequantize_per_channel" in str(node.target) for node in program.graph.nodes)
    integers = sum(kernel.kind == "linear" for kernel in report.kernels)
    assert integers == layers > 0
    assert "computed in float32" not in caplog.text
    found = np.asarray(tvm_backend.load(tmp_path / "model.so")(x.numpy()))
    expected = module(x).detach().numpy()
    # a value half way between two integers of a grid may fall to either side, and moves what follows it
    error = np.abs(found - expected).max(-1) / np.abs(expected).max()
    assert np.median(error) < 1e-5
    assert error.max() < 0.1


class _Unmasked(nn.Module):
    """Takes a mask that it does not read, so that nothing says that both are equally long."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(20, 8), nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.out(self.table(ids).mean(1))


def test_inputs_that_are_as_long_as_each_other_have_one_length(tmp_path):
    ids = torch.arange(192).reshape(32, 6) % 20
    calls = [{"ids": ids, "mask": torch.ones_like(ids)}]
    module, _ = quantize(_Unmasked().eval(), QuantSpec(w_bits=8, a_bits=8, preset="fast"), calls)
    program = export_program(module, calls[0])
    tvm_backend.compile(program, out=tmp_path / "model.so", tokens=5)
    library = tvm_backend.load(tmp_path / "model.so")
    given = ids[:, :5].contiguous()
    expected = module(ids=given, mask=given).detach().numpy()
    np.testing.assert_allclose(library(ids=given.numpy(), mask=given.numpy()), expected, atol=1e-5)


def test_a_library_takes_one_of_the_lengths(tmp_path):
    network = ZOO["llama"]
    x = network.inputs(8)
    module, _ = quantize(network.build(), QuantSpec(preset="fast", weight_only=True), x)
    program = export_program(module, x[:2])
    export_bundle(module, x[:2], tmp_path / "bundle")
    assert (
        main(["compile", str(tmp_path / "bundle"), "--out", str(tmp_path / "short.so"), "--tokens", "7"]) == 0
    )
    library = tvm_backend.load(tmp_path / "short.so")
    expected = module(x).detach().numpy()
    np.testing.assert_allclose(library(x[:, :7].numpy()), expected[:, :7], rtol=1e-3, atol=1e-4)
    padded = np.pad(
        x[:, :4].numpy(), ((0, 0), (0, 3))
    )  # causal: what is on the right changes nothing on the left
    np.testing.assert_allclose(np.asarray(library(padded))[:, :4], expected[:, :4], rtol=1e-3, atol=1e-4)
    with pytest.raises(LibraryError, match=r"the model takes \(batch, 7\)"):
        library(x[:, :4].numpy())
    with pytest.raises(CompileError, match="outside of what the graph takes"):
        tvm_backend.compile(program, out=tmp_path / "long.so", tokens=13)


def test_a_length_is_for_graphs_that_take_any(tmp_path):
    module, x = _Rounded().eval(), torch.randn(2, 3, 16)
    with pytest.raises(CompileError, match="takes inputs of one size"):
        tvm_backend.compile(torch.export.export(module, (x,)), out=tmp_path / "model.so", tokens=7)
