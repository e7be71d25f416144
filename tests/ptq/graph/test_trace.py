"""From an eager model to a graph without side effects."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cat_plugin.errors import QuantizationError
from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.graph.trace import trace
from tests.ptq.models import (
    randomise,
    small_inputs,
)


def test_in_place_operations_are_seen_by_later_readers():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            y = self.fc(x)
            F.relu(y, inplace=True)  # y itself changes
            return y + 1.0

    model, x = randomise(InPlace()), small_inputs(6, 4)
    with torch.no_grad():
        torch.testing.assert_close(trace(model, x)(x), model(x))


def test_control_flow_on_the_data_is_refused():
    class Picky(nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(QuantizationError, match="traced neither"):
        quantize(nn.Sequential(nn.Linear(3, 3), Picky()), QuantSpec(preset="fast"), small_inputs(4, 3))


@pytest.mark.parametrize(
    "assign",
    [
        lambda y: y[:, ::2].copy_(y[:, 1::2] * 2),
        lambda y: y[:, 1:].copy_(y[:, :1]),
        lambda y: y[:, :3].copy_(y[:, 3:].double()),
    ],
    ids=["slice", "broadcast", "another type"],
)
def test_what_is_assigned_has_a_gradient(assign):
    class Assigned(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            y = self.fc(x)
            assign(y)
            return self.head(y)

    model, x = randomise(Assigned()), small_inputs(6, 4)
    traced = trace(model, x)
    x.requires_grad_()
    expected = model(x)
    torch.testing.assert_close(traced(x), expected)
    gradients = [torch.autograd.grad(result.sum(), x)[0] for result in (traced(x), expected)]
    torch.testing.assert_close(*gradients)
