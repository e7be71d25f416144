"""Facts read off a graph: layers with and without bits, and corrections that cannot be taken over."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cat_plugin.errors import ExportError
from cat_plugin.graph import ClusterAffineModule
from cat_plugin.graph.export import export_program
from cat_plugin.graph.inspect import find_correction, quantized_layers
from cat_plugin.ptq import QuantSpec, quantize
from tests.cluster_affine.reference import random_parameters
from tests.ptq.models import small_inputs
from tests.zoo import ZOO


def _correction() -> ClusterAffineModule:
    return ClusterAffineModule(random_parameters("diagonal", np.random.default_rng(0)))


class Attention(nn.Module):
    """Products of activations beside a layer; the layer's weight is transposed on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(6) + 0.1)
        self.register_buffer("mixing", torch.ones(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        keys = F.linear(x, self.weight)
        scores = torch.matmul(x.unsqueeze(2), keys.unsqueeze(1)).mean(2)
        return torch.matmul(scores, self.mixing)


def test_layers_in_float_are_listed_and_products_of_activations_are_not() -> None:
    layers = quantized_layers(export_program(Attention().eval(), torch.ones(3, 6)))
    assert [(layer.name, layer.kind, layer.w_bits, layer.a_bits) for layer in layers] == [
        ("weight", "linear", None, None),
        ("mixing", "matmul", None, None),
    ]
    assert [layer.weight_bytes for layer in layers] == [4 * 36, 4 * 24]


def test_attention_with_scales_for_heads_is_no_layer_and_the_batch_stays_free() -> None:
    network = ZOO["vit"]
    x = network.inputs(8)
    module, _ = quantize(network.build(), QuantSpec(preset="fast"), x)
    program = export_program(module, x[:2])
    layers = quantized_layers(program)
    assert {layer.kind for layer in layers} == {"conv2d", "linear"}
    result = next(node for node in program.graph.nodes if node.op == "output").args[0][0]
    assert not isinstance(result.meta["val"].shape[0].node.maybe_as_int(), int)


def test_packed_weights_are_counted_in_bits() -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3)
    )
    quantized, _ = quantize(model, QuantSpec(w_bits=3, a_bits=4, preset="fast"), small_inputs(64, 3, 2, 2))
    layers = quantized_layers(export_program(quantized, small_inputs(2, 3, 2, 2)))
    assert [(layer.w_bits, layer.a_bits) for layer in layers] == [(8, 8), (3, 4), (8, 8)]
    assert layers[1].weight_bytes == 10  # 25 weights of 3 bits, rounded up to bytes
    assert layers[1].to_dict()["weight_shape"] == [5, 5]


def test_a_second_correction_is_refused() -> None:
    program = export_program(nn.Sequential(_correction(), _correction()), torch.ones(2, 10))
    with pytest.raises(ExportError, match="holds 2 cluster-affine steps; expected one"):
        find_correction(program)


def test_a_correction_that_is_computed_in_the_graph_is_refused() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = _correction()

        def forward(self, x: Tensor) -> Tensor:
            s = self.step
            return torch.ops.cat.cluster_affine(
                x, s.mean, s.components, s.centroids, s.gamma, x.mean() + s.beta, 0.5
            )

    with pytest.raises(
        ExportError, match=r"is computed in the graph .*append the step with cat_plugin\.correct"
    ):
        find_correction(export_program(Computed(), torch.ones(2, 10)))


def test_blending_and_arrays_are_those_of_the_module() -> None:
    step = _correction()
    found = find_correction(export_program(step, torch.ones(2, 10)))
    assert found is not None
    assert (found.op, found.alpha) == ("cluster_affine", step.alpha)
    for name, array in found.arrays.items():
        np.testing.assert_array_equal(array, getattr(step, name).numpy())
