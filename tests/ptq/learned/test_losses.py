"""The divergence of logits, and what a change of a block's output does to the prediction."""

from __future__ import annotations

import torch

from cat_plugin.ptq.graph.units import find_units
from cat_plugin.ptq.learned.losses import Tail, fisher_weights
from cat_plugin.ptq.learned.quality import Quality, divergence
from cat_plugin.ptq.learned.soft_unit import run_float
from cat_plugin.ptq.rows import Rows
from tests.ptq.learned.prepared import prepare
from tests.ptq.models import small_inputs


def test_fisher_weights_are_mean_squared_gradients():
    _, module, _, _, x = prepare()
    unit = find_units(module)[1]
    y = run_float(module, module_nodes_until(module, unit), placeholder(module), x, unit.output)
    tail = Tail(module, unit, Quality())
    (weights,) = fisher_weights(tail, Rows([y]), 16).tensors
    gradients = []
    for row in y:
        leaf = row.unsqueeze(0).clone().requires_grad_()
        order = list(module.graph.nodes)
        rest = [n for n in order[order.index(unit.output) + 1 :] if n.op not in ("get_attr", "output")]
        logits = run_float(module, rest, unit.output, leaf, order[-1].args[0])
        torch.nn.functional.cross_entropy(logits, logits.argmax(1)).backward()
        gradients.append(leaf.grad)
    expected = torch.cat(gradients).square().mean(0, keepdim=True)
    torch.testing.assert_close(weights, (expected / expected.mean()).clamp(min=0.01), rtol=1e-3, atol=1e-4)
    (gradient,) = tail.gradient(Rows([y[:3]]), [torch.zeros(3, dtype=torch.long)]).tensors
    assert gradient.shape == y[:3].shape


def placeholder(module):
    return next(n for n in module.graph.nodes if n.op == "placeholder")


def module_nodes_until(module, unit):
    order = [n for n in module.graph.nodes if n.op not in ("get_attr", "output", "placeholder")]
    return order[: order.index(unit.output) + 1]


def test_divergence_is_kullback_leibler():
    z_q, z_fp = small_inputs(5, 7, seed=1).double(), small_inputs(5, 7, seed=2).double()
    p, q = torch.softmax(z_fp / 3, 1), torch.softmax(z_q / 3, 1)
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(divergence(z_q, z_fp, 3.0), expected)
