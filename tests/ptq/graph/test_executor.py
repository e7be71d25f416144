"""Values of a graph's nodes for all inputs, in as little memory as they need."""

from __future__ import annotations

import torch
from torch import nn

from cat_plugin.ptq.cache import TensorStore
from cat_plugin.ptq.graph.executor import Executor, last_uses
from cat_plugin.ptq.graph.ops import is_batched
from cat_plugin.ptq.graph.trace import trace
from tests.ptq.models import small_inputs


def test_a_chain_of_activations_takes_one_tensor():
    class Chain(nn.Module):
        def forward(self, x):
            y = torch.relu(x + 1.0)
            return torch.sigmoid(torch.tanh(y)) * y

    x = small_inputs(6, 3, 4, 4)
    module = trace(Chain(), x)
    uses = last_uses(module.graph, {})
    with TensorStore() as store:
        executor = Executor(module, x, 2, store, lambda child, value: child(value))
        for node in module.graph.nodes:
            executor.run(node, uses.get(node, []))
            executor.drop(uses.get(node, []))
            result = node
            if is_batched(node) and node.op == "call_function":
                last = executor.values[node].clone()
        assert result.op == "output"
        assert store.peak == 2 * x.numel() * 4  # y, and one of the others at a time
    assert torch.equal(last, Chain()(x))
    assert torch.equal(x, small_inputs(6, 3, 4, 4))
