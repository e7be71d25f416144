"""Every layer shape of the benchmark networks, and of ViT-S, against exact integer sums."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.kernels import convolution
from benchmarks.layer_shapes import NETWORKS, Layer
from tests.tvm_backend.kernels.tools import TARGETS, check_weighted, random_tensor, random_weight
from tvm_backend.kernels.cpu import conv2d, linear
from tvm_backend.kernels.spec import Epilogue, LinearSpec, QParams

BEST = list(TARGETS)[-1]
"""The instruction set that a library for this machine takes, AMX aside; the others share the kernels' generators."""

GIVEN = QParams(0.02, 3, 0, 255, "uint8")
SIGNED = QParams(0.03, -5, -128, 127, "int8")
STORED = QParams(0.05, 0, 0, 15, "uint8")

CONVOLUTIONS = list(
    dict.fromkeys(layer._replace(count=1) for layers in NETWORKS.values() for layer in layers)
)

TOKENS = 197
"""Rows of ViT at 224 x 224: 14 x 14 patches and the class token."""

LINEARS = [
    (TOKENS, 384, 1152),  # queries, keys and values of ViT-S
    (TOKENS, 384, 384),
    (TOKENS, 384, 1536),
    (TOKENS, 1536, 384),
    (1, 384, 1000),
    (1, 64, 10),  # the heads of ResNet-20, ResNet-18, ResNet-50 and MobileNetV2
    (1, 512, 1000),
    (1, 2048, 1000),
    (1, 1280, 1000),
]


def check_convolution(layer: Layer, batch: int, bits: int, padding: tuple[int, int, int, int]) -> None:
    """Run a layer with ReLU, stored at 4 bits for the next layer and at 8 for a shortcut; with ReLU6 where it is depthwise."""
    epilogue = Epilogue((0.0, None), None, (STORED, SIGNED))
    if layer.depthwise:
        epilogue = Epilogue((0.0, 6.0), None, (GIVEN,))
    spec = replace(convolution(layer, bits, None), input=GIVEN, epilogue=epilogue, padding=padding)
    rng = np.random.default_rng(layer.macs)
    data = random_tensor(GIVEN, (batch, layer.size, layer.size, layer.inputs), rng)
    check_weighted(spec, BEST, data, random_weight(bits, spec.weight_shape, rng), rng, conv2d.reference)


def check_linear(rows: int, inputs: int, outputs: int, bits: int) -> None:
    """Run a layer on signed activations, as they come out of a normalization."""
    spec = LinearSpec(None, inputs, outputs, SIGNED, Epilogue((None, None), None, (SIGNED, "float32")), bits)
    rng = np.random.default_rng(rows + outputs)
    data = random_tensor(SIGNED, (rows, inputs), rng)
    check_weighted(spec, BEST, data, random_weight(bits, spec.weight_shape, rng), rng, linear.reference)


@pytest.mark.parametrize(
    ("layer", "bits"),
    [
        pytest.param(layer, (8, 4, 2)[i % 3], id=layer.name.replace(" ", "-"))
        for i, layer in enumerate(CONVOLUTIONS)
    ],
)
def test_convolutions_of_the_networks(layer: Layer, bits: int) -> None:
    check_convolution(layer, 1, bits, layer.padding)


@pytest.mark.parametrize(
    ("layer", "bits"),
    [
        pytest.param(layer, (2, 8, 4)[i % 4 % 3], id=layer.name.replace(" ", "-"))
        # The large images cost seconds in numpy, and differ from smaller ones by their number of rows only.
        for i, layer in enumerate(layer for layer in CONVOLUTIONS if layer.out_size <= 14)
        if i % 3 == 0
    ],
)
def test_sixteen_images(layer: Layer, bits: int) -> None:
    check_convolution(layer, 16, bits, layer.padding)


@pytest.mark.parametrize("bits", [2, 8])
def test_patch_embedding_of_a_vision_transformer(bits: int) -> None:
    check_convolution(Layer(1, 224, 3, 384, 16, 16), 1, bits, (0, 0, 0, 0))


@pytest.mark.parametrize(("rows", "inputs", "outputs"), LINEARS)
def test_linear_layers_of_the_networks(rows: int, inputs: int, outputs: int) -> None:
    check_linear(rows, inputs, outputs, 4 if inputs == 384 else 8)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), LINEARS[2:6])
def test_linear_layers_on_sixteen_images(rows: int, inputs: int, outputs: int) -> None:
    check_linear(16 * rows, inputs, outputs, 2)
