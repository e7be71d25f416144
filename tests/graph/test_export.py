"""Export: equal to the module, any batch size, readable by others, clear when it cannot be done."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cat_plugin.errors import CATTypeError, ExportError
from cat_plugin.graph.export import export_program
from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.torch_compat import register_quantized_decomposed
from tests.ptq.models import GroupedNet, SmallResNet, randomise, small_inputs


def _quantized(make, shape, **options):
    x = small_inputs(*shape)
    spec = QuantSpec(**{"preset": "fast", "batch_size": 8, **options})
    return quantize(randomise(make()), spec, x)[0], x


@pytest.mark.parametrize(("make", "shape"), [(SmallResNet, (24, 3, 12, 12)), (GroupedNet, (24, 4, 8, 8))])
@pytest.mark.parametrize("bits", [2, 8])
def test_export_equals_the_module_at_any_batch_size(make, shape, bits):
    module, x = _quantized(make, shape, w_bits=bits, a_bits=bits)
    program = export_program(module, x[:1]).module()
    for count in (1, 2, 7, 24):
        expected = module(x[:count])
        assert float((program(x[:count]) - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


def test_the_exported_graph_is_qdq_with_integers_inside(tmp_path):
    module, x = _quantized(SmallResNet, (24, 3, 12, 12), w_bits=2, a_bits=2)
    program = export_program(module, (x,))
    assert not program.example_inputs
    counts: dict[str, int] = {}
    for node in program.graph.nodes:
        counts[str(node.target)] = counts.get(str(node.target), 0) + 1
    assert counts["quantized_decomposed.dequantize_per_channel.default"] == 6
    assert counts["quantized_decomposed.quantize_per_tensor.default"] >= 6
    weights = [v for v in program.state_dict.values() if v.dtype == torch.int8]
    assert len(weights) == 6
    assert not any(v.is_floating_point() and v.ndim > 1 for v in program.state_dict.values())
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    assert torch.equal(again(x[:5]), program.module()(x[:5]))


def test_any_exportable_module_is_taken_and_its_mode_kept():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(12, 3))
    x = small_inputs(4, 3, 2, 2)
    program = export_program(model, x).module()
    assert model.training
    assert torch.allclose(program(x), model.eval()(x))


def test_what_cannot_be_exported_is_named():
    class Picky(nn.Module):
        def forward(self, x):
            return x * 2 if float(x.sum()) > 0 else x

    model = nn.Sequential(nn.Linear(3, 3), Picky())
    with pytest.raises(ExportError, match="in 1 \\(Picky\\)"):
        export_program(model, small_inputs(4, 3))
    with pytest.raises(CATTypeError):
        export_program(model, "x")
    with pytest.raises(ExportError, match="batch"):
        export_program(model, small_inputs(0, 3))


class FloatWeights(nn.Module):
    """Weights in floating point, quantized in the graph, as some quantizers leave them."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(6, 6, generator=generator))
        self.last = nn.Parameter(torch.randn(6, 3, generator=generator))
        self.register_buffer("scales", torch.rand(6, generator=generator) / 20 + 0.01)
        self.register_buffer("zero_points", torch.zeros(6, dtype=torch.int64))
        self.both = both

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ops = torch.ops.quantized_decomposed
        channels = (self.scales, self.zero_points, 0, -127, 127, torch.int8)
        weight = ops.dequantize_per_channel(ops.quantize_per_channel(self.weight, *channels), *channels)
        x = nn.functional.linear(x, weight)
        whole = (0.05, 3, -2, 1, torch.int8)
        # The same parameter with another quantizer, and in floating point.
        x = x + nn.functional.linear(
            x, ops.dequantize_per_tensor(ops.quantize_per_tensor(self.weight, *whole), *whole)
        )
        if self.both:
            x = x @ self.weight
        # Of an input: to be left as it is.
        x = ops.dequantize_per_tensor(ops.quantize_per_tensor(x, *whole), *whole)
        last = ops.quantize_per_tensor(self.last.t(), *whole)
        return nn.functional.linear(x, ops.dequantize_per_tensor(last, *whole))


@pytest.mark.parametrize("both", [False, True])
def test_float_weights_are_stored_as_integers(both, tmp_path):
    register_quantized_decomposed()

    module, x = FloatWeights(both), torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    program = export_program(module, x)
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("quantize_per" in target and ".quantize" in target for target in targets) == 1
    stored = {name: value for name, value in program.state_dict.items() if value.ndim == 2}
    assert sorted(value.dtype == torch.int8 for value in stored.values()) == [False] * both + [True] * 3
    assert ("weight" in stored and stored["weight"].dtype == torch.float32) == both
    expected = (module.weight / module.scales[:, None]).round().clamp(-127, 127).to(torch.int8)
    first = "weight_integers" if both else "weight"
    assert torch.equal(stored[first], expected)
    assert torch.equal(stored["last"], (module.last.t() / 0.05 + 3).round().clamp(-2, 1).to(torch.int8))
    torch.export.save(program, tmp_path / "p.pt2")
    for each in (program, torch.export.load(tmp_path / "p.pt2")):
        for count in (1, 5):
            assert torch.equal(each.module()(x[:count]), module(x[:count]))


def test_a_graph_of_our_own_needs_no_folding():
    module, x = _quantized(SmallResNet, (24, 3, 12, 12), w_bits=2, a_bits=2)
    program = export_program(module, x)
    names = {str(spec.target) for spec in program.graph_signature.input_specs if spec.target}
    assert names == set(program.state_dict) | set(program.constants)
    assert not [name for name in names if "integers" in name]


def test_a_graph_deeper_than_python_recurses_is_exported():
    register_quantized_decomposed()
    qd = torch.ops.quantized_decomposed

    class Deep(nn.Module):
        def forward(self, x):
            for _ in range(600):
                x = x + 0.001
            grid = (0.1, 0, 0, 255, torch.uint8)
            return qd.dequantize_per_tensor(qd.quantize_per_tensor(x, *grid), *grid)

    x = torch.rand(4, 3)
    program = export_program(Deep(), x)
    torch.testing.assert_close(program.module()(x), Deep()(x))
