"""Layers of every kind for the tests of the closed form."""

from __future__ import annotations

import torch

from cat_plugin.ptq.graph.modules import QuantOp
from tests.ptq.models import small_inputs

_ATEN = torch.ops.aten


LAYERS = [
    (_ATEN.conv2d.default, (6, 4, 3, 3), (5, 4, 9, 8), ([2, 1], [1, 2], [1, 2], 1)),
    (_ATEN.conv2d.default, (6, 2, 3, 3), (5, 4, 7, 7), ([1, 1], [1, 1], [1, 1], 2)),
    (_ATEN.conv2d.default, (4, 1, 3, 3), (5, 4, 7, 7), ([1, 1], [0, 0], [1, 1], 4)),
    (_ATEN.conv2d.padding, (6, 4, 4, 3), (5, 4, 9, 8), ([1, 1], "same")),
    (_ATEN.conv1d.default, (6, 4, 5), (5, 4, 17), ([2], [3], [1], 1)),
    (_ATEN.linear.default, (6, 4), (5, 7, 4), ()),
]


def make_layer(case, bits=4):
    target, weight_shape, input_shape, extra = case
    weight, bias = small_inputs(*weight_shape, seed=3), small_inputs(weight_shape[0], seed=4)
    return QuantOp("layer", target, weight, bias, extra, bits, bits), small_inputs(*input_shape, seed=5)
