"""Values of a graph's nodes for all inputs, in as little memory as they need."""

from __future__ import annotations

import torch
from torch import nn

from cat_plugin.ptq.cache import TensorStore
from cat_plugin.ptq.graph import executor as executor_module
from cat_plugin.ptq.graph.executor import Executor, last_uses
from cat_plugin.ptq.graph.ops import WEIGHTED, is_batched, is_call
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


def test_a_pass_takes_a_third_of_the_budget(monkeypatch):
    """A batch that would take more is computed in portions, to the same values."""
    monkeypatch.setattr(executor_module, "_PASS", 0)
    x = small_inputs(9, 3, 4, 4)
    model = nn.Conv2d(3, 5, 3, padding=1)
    module = trace(model, x)
    (node,) = [n for n in module.graph.nodes if is_call(n, WEIGHTED)]
    row = 4 * (3 + 5) * 4 * 4 * 4  # operand, result, and three times as much again
    with TensorStore(3 * 4 * row) as store:
        executor = Executor(module, x, 8, store, lambda child, value: child(value))
        assert [(s.start, s.stop) for s in executor.pieces(node)] == [(0, 4), (4, 8), (8, 9)]
        assert [(s.start, s.stop) for s in executor.pieces(node, 3)] == [(0, 3)]
        executor.run(node)
        torch.testing.assert_close(executor.values[node], model(x))
    with TensorStore(1) as store:
        least = Executor(module, x, 8, store, lambda child, value: child(value))
        assert len(least.pieces(node)) == 9
    with TensorStore() as store:
        free = Executor(module, x, 8, store, lambda child, value: child(value))
        assert len(free.pieces(node)) == 2
