"""Convolution kernels against exact integer sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm.target import Target

from benchmarks.kernels import convolution
from benchmarks.layer_shapes import NETWORKS
from cat_plugin.errors import CompileError
from cat_plugin.ptq.quantizers.neighbours import bounded, partners
from tests.tvm_backend.kernels.tools import (
    TARGETS,
    batches,
    check_kernel,
    check_weighted,
    epilogues,
    network_layer,
    qparams,
    random_tensor,
    random_weight,
)
from tvm_backend.kernels.cpu.conv2d import DirectConv, reference, sums
from tvm_backend.kernels.cpu.isa import Avx512Vnni
from tvm_backend.kernels.cpu.linear import Linear
from tvm_backend.kernels.cpu.tasks import Tasks
from tvm_backend.kernels.registry import lower
from tvm_backend.kernels.spec import ConvSpec, Epilogue, LinearSpec, QParams

IMAGE = QParams(0.02, 3, 0, 255, "uint8")


@st.composite
def convolutions(draw: st.DrawFn, depthwise: bool = False) -> tuple[ConvSpec, int]:
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    height = draw(st.integers(1, 12)) + (kernel[0] - 1) * dilation[0]
    width = draw(st.integers(1, 31)) + (kernel[1] - 1) * dilation[1]
    if depthwise:
        groups = channels_in = channels_out = draw(
            st.integers(2, 70) | st.sampled_from([16, 32, 48, 64, 112, 144])
        )
    else:
        groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
        channels_in = groups * draw(st.integers(1, 21))
        channels_out = groups * draw(st.integers(1, 90))
    batch, known = draw(batches)
    spec = ConvSpec(
        batch=batch if known else None,
        height=height,
        width=width,
        in_channels=channels_in,
        out_channels=channels_out,
        kernel=kernel,
        input=draw(qparams()),
        epilogue=draw(epilogues()),
        stride=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        padding=tuple(draw(st.integers(0, 2)) for _ in range(4)),
        dilation=dilation,
        groups=groups,
        weight_bits=draw(st.sampled_from([2, 3, 4, 8])),
    )
    return spec, batch


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=25, deadline=None)
@given(case=convolutions() | convolutions(depthwise=True), seed=st.integers(0, 2**32 - 1))
def test_any_convolution_equals_the_reference_to_the_bit(target, case, seed):
    spec, batch = case
    rng = np.random.default_rng(seed)
    data = random_tensor(spec.input, (batch, spec.height, spec.width, spec.in_channels), rng)
    weight = random_weight(spec.weight_bits, spec.weight_shape, rng)
    if fitted := rng.integers(2):
        weight = weight // 2
    kernel = lower(spec, Target(TARGETS[target]), weight if fitted else None)
    check_kernel(kernel, Target(TARGETS[target]), data, weight, rng, reference)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize(
    ("size", "channels_in", "channels_out", "kernel", "stride"),
    [(7, 512, 512, 3, 1), (28, 64, 128, 1, 2), (14, 96, 576, 1, 1), (40, 3, 64, 7, 2)],
)
def test_layers_of_real_networks(target, bits, size, channels_in, channels_out, kernel, stride):
    spec = network_layer(size, channels_in, channels_out, kernel, stride, bits, IMAGE)
    rng = np.random.default_rng(1)
    data = random_tensor(spec.input, (2, size, size, channels_in), rng)
    check_weighted(spec, target, data, random_weight(bits, spec.weight_shape, rng), rng, reference)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize(
    ("size", "channels", "kernel", "stride", "epilogue"),
    [
        (14, 96, (3, 3), 1, Epilogue((0.0, 6.0), None, (IMAGE,))),
        (15, 144, (3, 3), 2, Epilogue((0.0, None), None, (QParams(0.3, 0, 0, 3, "uint8"), IMAGE))),
        (13, 32, (5, 5), 1, Epilogue((None, None), IMAGE, ("float32", QParams(0.05, -7, -128, 127, "int8")))),
        (9, 16, (2, 7), 2, Epilogue((None, None), None, (QParams(0.02, -3, -128, 127, "int8"),))),
    ],
)
def test_depthwise_layers(target, dtype, size, channels, kernel, stride, epilogue):
    own = QParams(0.02, 5, 0, 255, "uint8") if dtype == "uint8" else QParams(0.02, -5, -128, 127, "int8")
    spec = ConvSpec(
        batch=None,
        height=size,
        width=size,
        in_channels=channels,
        out_channels=channels,
        kernel=kernel,
        input=own,
        epilogue=epilogue,
        stride=(stride, stride),
        padding=(1, 2, 1, 0),
        groups=channels,
    )
    rng = np.random.default_rng(6)
    data = random_tensor(own, (2, size, size, channels), rng)
    check_weighted(spec, target, data, random_weight(8, spec.weight_shape, rng), rng, reference)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_extreme_values_do_not_saturate(target, dtype):
    low, high = (0, 255) if dtype == "uint8" else (-128, 127)
    spec = ConvSpec(1, 4, 16, 64, 32, (3, 3), QParams(0.02, low, low, high, dtype), Epilogue())
    data = np.full((1, 4, 16, 64), high, dtype)
    for value in (-128, 127):
        weight = np.full(spec.weight_shape, value, np.int8)
        check_weighted(spec, target, data, weight, np.random.default_rng(0), reference)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("bits", "most", "extremes"),
    [
        (2, 255, (-3, 3)),  # sums of 16 bits take up 21 groups of four products
        (4, 255, (-15, 15)),  # 4
        (4, 15, (-15, 15)),  # 72
        (8, 15, (-128, 127)),  # 8
        (8, 127, (-128, 127)),  # 1
        (8, 128, (-128, 127)),  # none
        (2, 3, (-3, 3)),  # 1820
    ],
)
@pytest.mark.parametrize(
    ("kernel", "channels", "groups"),
    [((3, 3), 100, 1), ((1, 1), 7300, 1), ((3, 3), 64, 64), ((5, 2), 48, 48)],
)
def test_the_largest_products_do_not_overflow(target, bits, most, extremes, kernel, channels, groups):
    given = QParams(0.02, 0, 0, most, "uint8")
    out = 5 if groups == 1 else channels
    spec = ConvSpec(1, 5, 6, channels, out, kernel, given, Epilogue(), groups=groups, weight_bits=bits)
    data = np.full((1, 5, 6, channels), most, np.uint8)
    weight = np.full(spec.weight_shape, extremes[0], np.int8)
    weight[::2] = extremes[1]
    check_weighted(spec, target, data, weight, np.random.default_rng(0), reference)


def pairs(shape, first, second):
    """Weights that alternate between two values from channel to channel."""
    weight = np.empty(shape, np.int8)
    weight[:, ::2], weight[:, 1::2] = first, second
    return weight


@pytest.mark.parametrize("target", [name for name in TARGETS if name in ("avx2", "avx512bw")])
@pytest.mark.parametrize(
    ("bits", "most", "pair", "depth"),
    [
        (7, 255, (64, 64), 1),
        (7, 255, (-64, -64), 1),
        (8, 255, (127, 1), 1),
        (8, 255, (127, -128), 1),  # of two signs, so each alone
        (8, 255, (-128, 0), 1),
        (6, 255, (32, 32), 2),
        (8, 127, (64, 65), 2),  # 32766
        (8, 127, (65, 65), 1),
        (4, 255, (8, 8), 8),
        (2, 255, (-2, -2), 32),
    ],
)
def test_weights_that_are_small_enough_are_multiplied_as_bytes(target, bits, most, pair, depth):
    """Also 8-bit ones where no two neighbours of one sign exceed 128; the sums that come closest to 16 bits are exact."""
    given = QParams(0.02, 0, 0, most, "uint8")
    spec = ConvSpec(1, 5, 6, 66, 40, (3, 3), given, Epilogue(), weight_bits=bits)
    weight = pairs(spec.weight_shape, *pair)
    kernel = lower(spec, Target(TARGETS[target]), weight)
    assert kernel.variant == f"{target}_bytes"
    assert kernel.machine.depth == depth
    assert not kernel.remark
    data = np.full((1, 5, 6, 66), most, np.uint8)
    check_kernel(kernel, Target(TARGETS[target]), data, weight, np.random.default_rng(0), reference)


@pytest.mark.parametrize(("together", "depth"), [(2, 1), (4, 2)])
@pytest.mark.parametrize(
    ("channels", "groups", "dilation"),
    [(66, 1, 1), (3, 1, 1), (3, 1, 2), (6, 2, 1), (5, 1, 1), (40, 1, 2), (1, 1, 1)],
)
def test_what_the_engine_bounds_is_what_lies_side_by_side(channels, groups, dilation, together, depth):
    """`bounded_sums` knows of neighbours what the kernels do: the largest weights, bounded, are multiplied as bytes."""
    given = QParams(0.02, 0, 0, 255, "uint8")
    sizes = {"dilation": (1, dilation), "groups": groups}
    spec = ConvSpec(1, 9, 9, channels, 8, (3, 3), given, Epilogue(), **sizes)
    weight = pairs(spec.weight_shape, 127, 127)
    neighbours = partners(spec.weight_shape, groups, dilation, together)
    flat = torch.from_numpy(weight.reshape(len(weight), -1).astype(np.float32))
    small = bounded(flat, neighbours).numpy().astype(np.int8).reshape(weight.shape)
    machine = Target(TARGETS["avx2"])
    assert lower(spec, machine, weight).variant == "avx2"
    kernel = lower(spec, machine, small)
    assert kernel.variant == "avx2_bytes"
    assert kernel.machine.depth >= depth
    data = np.full((1, 9, 9, channels), 255, np.uint8)
    check_kernel(kernel, machine, data, small, np.random.default_rng(0), reference)
    small[0, 0, 0, 0] += 1  # one more than fits
    kernel = lower(spec, machine, small)
    assert (kernel.variant, kernel.machine.depth) == ("avx2" if together == 2 else "avx2_bytes", 1)


@pytest.mark.parametrize("target", ["haswell", "skylake-avx512"])
def test_weights_that_are_not_are_widened_and_never_packed_for_bytes(target):
    spec = ConvSpec(1, 5, 6, 66, 40, (3, 3), QParams(0.02, 0, 0, 255, "uint8"), Epilogue())
    machine = Target({"kind": "llvm", "mcpu": target})
    large, small = pairs(spec.weight_shape, 127, 2), pairs(spec.weight_shape, 64, 64)
    kernel = lower(spec, machine, large)
    assert kernel.machine.group == 2
    assert kernel.remark == "in words: neighbouring weights exceed 128 (see bounded_sums)"
    assert lower(spec, machine) is kernel
    assert lower(spec, machine, small) is lower(spec, machine, small // 2 * 2 - 1)
    with pytest.raises(CompileError, match="weights of conv2d_3x3_66_40 are too large for a kernel"):
        lower(spec, machine, small).pack_weight(large)


@pytest.mark.parametrize("target", TARGETS)
def test_folded_zero_points_are_packed_by_channel(target):
    # Codes 0..3 minus a zero point of 0..3 reach -3..3: more than 2 bits over all channels, not in any one.
    rng = np.random.default_rng(2)
    spec = ConvSpec(None, 6, 6, 8, 20, (3, 3), IMAGE, Epilogue(), padding=(1, 1, 1, 1), weight_bits=2)
    weight = rng.integers(0, 4, spec.weight_shape) - rng.integers(0, 4, (20, 1, 1, 1))
    assert weight.min() == -3
    assert weight.max() == 3
    data = random_tensor(IMAGE, (3, 6, 6, 8), rng)
    check_weighted(spec, target, data, weight.astype(np.int8), rng, reference)


def test_reference_sums_equal_torch():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    rng = np.random.default_rng(3)
    spec = ConvSpec(
        2, 9, 11, 6, 8, (3, 2), IMAGE, Epilogue(), (2, 1), padding=(1, 1, 1, 1), dilation=(1, 2), groups=2
    )
    data = random_tensor(IMAGE, (2, 9, 11, 6), rng)
    weight = random_weight(8, spec.weight_shape, rng)
    shifted = torch.from_numpy(data.astype(np.float64) - 3).permute(0, 3, 1, 2)
    expected = torch.nn.functional.conv2d(
        shifted,
        torch.from_numpy(weight.astype(np.float64)),
        stride=(2, 1),
        padding=1,
        dilation=(1, 2),
        groups=2,
    )
    np.testing.assert_array_equal(sums(spec, data, weight), expected.permute(0, 2, 3, 1).numpy())


def test_padding_of_channels_is_kept_small():
    """ResNet-18's packed weights, first and last layer at 8 bits and the others at 2, beside float32."""
    packed = plain = 0
    for number, layer in enumerate(NETWORKS["ResNet-18"]):
        spec = convolution(layer, 8 if number == 0 else 2, 1)
        packed += layer.count * DirectConv(spec, Avx512Vnni()).weight_length
        plain += layer.count * 4 * math.prod(spec.weight_shape)
    head = LinearSpec(1, 512, 1000, IMAGE, Epilogue(outputs=("float32",)), 8)
    packed, plain = packed + Linear(head, Avx512Vnni()).weight_length, plain + 4 * 512 * 1000
    assert packed * 14 <= plain


def test_tasks_are_no_more_than_enough():
    assert Tasks(1, 56, 10, 10).per_image == 56
    assert Tasks(1, 56, 10, 10, enough=8).per_image == 8
    assert Tasks(1, 56, 10, 10, most=5, enough=8).per_image == 12, "a task must fit"
    assert Tasks(1, 56, 1, 20, enough=8).per_image == 2, "a task must be worth it"
