"""Units of reconstruction, found from the graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cat_plugin.ptq import QuantSpec
from cat_plugin.ptq.graph.fold import fold_batch_norm
from cat_plugin.ptq.graph.insert import insert_quantizers
from cat_plugin.ptq.graph.trace import trace
from cat_plugin.ptq.graph.units import find_units
from tests.ptq.models import (
    MODELS,
    Gelu1d,
    SmallResNet,
    randomise,
    small_inputs,
)


def _units(make, shape, **options):
    module = trace(randomise(make()), small_inputs(*shape))
    fold_batch_norm(module)
    insert_quantizers(module, QuantSpec())
    return module, find_units(module, **options)


def test_residual_blocks_are_units_and_chains_are_layers():
    _, units = _units(SmallResNet, (4, 3, 12, 12))
    assert [u.name for u in units] == ["stem.0", "block1", "block2", "fc"]
    assert [len(u.layers) for u in units] == [1, 2, 2, 1]
    _, units = _units(Gelu1d, (4, 2, 40))
    assert [u.name for u in units] == ["a", "b", "fc"]


def test_blocks_without_a_shortcut_follow_their_siblings_with_one():
    class Inverted(nn.Module):
        def __init__(self, channels, shortcut):
            super().__init__()
            self.conv = nn.Sequential(nn.Conv2d(channels, 8, 1), nn.ReLU6(), nn.Conv2d(8, channels, 1))
            self.shortcut = shortcut

        def forward(self, x):
            return x + self.conv(x) if self.shortcut else self.conv(x)

    def make():
        blocks = nn.Sequential(*(Inverted(3, shortcut) for shortcut in (False, True, False, False)))
        return nn.Sequential(nn.Conv2d(3, 3, 1), blocks, nn.Flatten(), nn.Linear(48, 2))

    _, units = _units(make, (4, 3, 4, 4))
    # the container of a block's layers is no block, nor is that of the blocks
    assert [len(u.layers) for u in units] == [1, 2, 2, 2, 2, 1]
    assert [u.name for u in units] == ["0", *(f"1.{i}.conv" for i in range(4)), "3"]
    _, units = _units(Gelu1d, (4, 2, 40), names=("a", "b"))
    assert [u.name for u in units] == ["a", "b", "fc"]


@pytest.mark.parametrize(("make", "shape"), MODELS)
@pytest.mark.parametrize("granularity", ["layer", "block", "model"])
def test_units_in_a_row_compute_the_graph(make, shape, granularity):
    from cat_plugin.ptq.learned.soft_unit import run_nodes

    module, units = _units(make, shape, granularity=granularity)
    x = small_inputs(*shape)
    layers = [layer for unit in units for layer in unit.layers]
    assert (
        len(layers)
        == len(set(layers))
        == sum(n.op == "call_module" and n.target.startswith("op_") for n in module.graph.nodes)
    )
    if granularity != "layer":
        value = x
        for unit in units:
            env = {unit.source: value}
            run_nodes(module, unit.nodes, env, lambda child, v: child(v))
            value = env[unit.output]
        torch.testing.assert_close(value, module(x), rtol=1e-5, atol=1e-6)


def test_layer_units_reach_inside_blocks():
    _, units = _units(SmallResNet, (4, 3, 12, 12), granularity="layer")
    assert [u.name for u in units] == [
        "stem.0",
        "block1.conv1",
        "block1.conv2",
        "block2.conv1",
        "block2.conv2",
        "fc",
    ]
    assert [str(u.output.target) for u in units[:3]] == [
        "aten.relu.default",
        "aten.relu.default",
        "op_conv2d_2",
    ]
