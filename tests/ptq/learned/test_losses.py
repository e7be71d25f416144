"""The divergence of logits, and what a change of a block's output does to the prediction."""

from __future__ import annotations

import torch
from torch import nn

from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.graph.insert import insert_quantizers
from cat_plugin.ptq.graph.trace import trace
from cat_plugin.ptq.graph.units import find_units
from cat_plugin.ptq.learned.losses import Tail, curvature_directions, curvature_weights, fisher_weights
from cat_plugin.ptq.learned.quality import Quality, divergence
from cat_plugin.ptq.learned.soft_unit import run_float
from cat_plugin.ptq.rows import Rows
from tests.ptq.learned.prepared import prepare
from tests.ptq.models import randomise, small_inputs
from tests.zoo import ZOO


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


def test_blocks_of_a_vision_transformer_are_trained_by_the_curvature():
    network = ZOO["vit"]
    model, x = network.build(), network.inputs(32)
    options = {"w_bits": 3, "a_bits": 4, "attention_bits": 4, "smoothing": "searched", "num_samples": 32}
    spec = QuantSpec(
        preset="balanced", loss="curvature", unit_steps=40, refinement_steps=4, batch_size=16, **options
    )
    module, report = quantize(model, spec, x)
    trained = [unit for unit in report.units if unit.kind == "unit"]
    assert len(trained) == 2
    assert all(unit.loss_after <= unit.loss_before for unit in trained)
    assert sum(unit.loss_after for unit in trained) < 0.95 * sum(unit.loss_before for unit in trained)
    assert torch.isfinite(module(x)).all()


def test_curvature_weights_follow_what_is_read():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.second(torch.relu(self.first(x)))[:, 1])

    model, x = randomise(Tokens()), small_inputs(12, 3, 4)
    module = trace(model, x[:2])
    insert_quantizers(module, QuantSpec(preset="fast"))
    unit = find_units(module, (), "layer")[1]
    tail = Tail(module, unit, Quality(), {})
    y = Rows([torch.randn(12, 3, 6, generator=torch.Generator().manual_seed(0))])
    (weights,) = curvature_weights(tail, y, 5, 2.0).tensors
    assert weights.shape == (1, 3, 6)
    assert torch.equal(weights[0, [0, 2]], torch.full((2, 6), 0.01))  # nobody reads these tokens
    torch.testing.assert_close(weights[0, 1].mean(), torch.tensor(3.0), rtol=1e-4, atol=0)


def test_directions_have_the_curvature_of_the_divergence_as_their_mean():
    model = randomise(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Linear(5, 3)))
    module = trace(model, small_inputs(2, 4))
    insert_quantizers(module, QuantSpec(preset="fast"))
    unit = find_units(module, (), "layer")[1]
    generator = torch.Generator().manual_seed(0)
    y, error = torch.randn(6, 5, generator=generator), torch.randn(6, 5, generator=generator)
    loss = curvature_directions(Tail(module, unit, Quality()), Rows([y]), 4, 2.0, rank=2000)
    rows = torch.tensor([4, 1, 0])
    head = model[3].weight.detach().double()
    p = torch.softmax(model[3](y).detach().double() / 2, 1)
    expected = 0.0
    for row in rows.tolist():
        fisher = head.T @ (torch.diag(p[row]) - torch.outer(p[row], p[row])) @ head
        expected += float(error[row].double() @ fisher @ error[row].double() / fisher.trace()) / 3
    expected /= float(y.double().square().mean())
    found = float(loss(Rows([(y + error)[rows]]), rows))
    assert abs(found / expected - 1) < 0.05
    assert float(loss(Rows([y[rows]]), rows)) == 0.0


def test_blocks_are_trained_along_directions_of_curvature():
    network = ZOO["vit"]
    model, x = network.build(), network.inputs(32)
    options = {"w_bits": 3, "a_bits": 4, "attention_bits": 4, "num_samples": 32, "batch_size": 16}
    options["rounding"] = "straight_through"  # which gains in so few steps
    weights = []
    for loss in ("curvature", "fima"):
        spec = QuantSpec(preset="balanced", loss=loss, unit_steps=20, refinement_steps=0, **options)
        module, report = quantize(model, spec, x)
        assert any(u.loss_after < u.loss_before for u in report.units)
        weights.append(torch.cat([b.flatten().float() for _, b in module.named_buffers()]))
    assert not torch.equal(*weights)
