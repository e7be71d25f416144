"""Node by node, what is handed over is what was calibrated."""

import pytest
import torch

from cat_plugin.errors import QuantizationError
from cat_plugin.ptq import QuantSpec
from cat_plugin.ptq.engine import quantize
from cat_plugin.ptq.graph import lockstep
from cat_plugin.ptq.graph.lower import lower
from cat_plugin.ptq.stages import preparation
from tests.ptq.models import SmallResNet, randomise, small_inputs

SPEC = QuantSpec(w_bits=4, a_bits=4, preset="fast", num_samples=8, batch_size=8)


def swapped(graph):
    """One function in the place of another."""
    for node in graph.nodes:
        if node.target is torch.ops.aten.relu.default:
            node.target = torch.ops.aten.abs.default


def shifted(graph):
    """Another zero point where the last activation becomes a number again."""
    *_, last = (
        n for n in graph.nodes if n.target is torch.ops.quantized_decomposed.dequantize_per_tensor.default
    )
    last.args = (*last.args[:2], last.args[2] + 1, *last.args[3:])


def turned(graph):
    """Another value of the same shape returned."""
    output = graph.output_node()
    (result,) = output.all_input_nodes
    with graph.inserting_before(output):
        output.args = (graph.call_function(torch.neg, (result,)),)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (swapped, "lowered, 'relu.*' is .* away"),
        (shifted, "lowered, '.*' is .* away from what was calibrated"),
        (turned, "the graph returns .*neg.*; expected"),
    ],
)
def test_what_lowering_changes_is_an_error_that_names_the_node(monkeypatch, fault, message):
    def broken(module):
        lowered, counterparts = lower(module)
        fault(lowered.graph)
        lowered.recompile()
        return lowered, counterparts

    monkeypatch.setattr(preparation, "lower", broken)
    with pytest.raises(QuantizationError, match=message):
        quantize(randomise(SmallResNet()), SPEC, small_inputs(8, 3, 8, 8))


def test_a_few_values_on_the_edge_of_a_level_are_no_fault_and_many_are():
    levels = torch.arange(400.0).view(4, 100) % 8
    one, many = levels.clone(), levels.clone()
    one[2, 3] += 1
    many[:, :5] += 1
    assert lockstep._distance(one, levels, True) == 0.0
    assert lockstep._distance(one, levels, False) > 0.1
    assert lockstep._distance(many, levels, True) > 0.1
    assert lockstep._distance((levels, many), (levels, levels), False) > 0.1
