"""What specifications say of their kernels: arguments, shapes, bytes, names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cat_plugin.errors import CompileError
from tvm_backend.kernels.spec import (
    ConcatSpec,
    ConvSpec,
    DequantizeSpec,
    ElementwiseSpec,
    Epilogue,
    KernelSpec,
    LinearSpec,
    PoolSpec,
    ProductSpec,
    QParams,
    QuantizeSpec,
    RotationSpec,
    RowsSpec,
    SubsampleSpec,
)

U8 = QParams(0.02, 3, 0, 255, "uint8")
S8 = QParams(0.03, -5, -128, 127, "int8")
TWO = Epilogue((0.0, None), S8, (U8, "float32"))

FACTS: dict[str, tuple[KernelSpec, str, list[Any], int]] = {
    "elementwise": (
        ElementwiseSpec(None, (5, 6), (U8, "float32"), Epilogue(outputs=(S8,))),
        "add",
        [
            ("input0", ("n", 5, 6), "uint8"),
            ("input1", ("n", 5, 6), "float32"),
            ("output0", ("n", 5, 6), "int8"),
        ],
        30 * (1 + 4 + 1),
    ),
    "concat": (
        ConcatSpec(None, (3,), (2, 4), (U8, S8), Epilogue(outputs=(U8, S8))),
        "concat",
        [
            ("input0", ("n", 3, 2), "uint8"),
            ("input1", ("n", 3, 4), "int8"),
            ("output0", ("n", 3, 6), "uint8"),
            ("output1", ("n", 3, 6), "int8"),
        ],
        18 + 2 * 18,
    ),
    "pool": (
        PoolSpec("avg", None, 6, 4, 8, (2, 2), (2, 2), U8, TWO),
        "avg_pool_2x2_8",
        [
            ("data", ("n", 6, 4, 8), "uint8"),
            ("residual", ("n", 3, 2, 8), "int8"),
            ("output0", ("n", 3, 2, 8), "uint8"),
            ("output1", ("n", 3, 2, 8), "float32"),
        ],
        192 + 48 * (1 + 1 + 4),
    ),
    "subsample": (
        SubsampleSpec(None, 7, 5, 4, (2, 2), 2, 3, S8),
        "subsample",
        [("data", ("n", 7, 5, 4), "int8"), ("output0", ("n", 4, 3, 9), "int8")],
        2 * 4 * 3 * 9,  # pixels that are skipped are not read
    ),
    "quantize": (
        QuantizeSpec(None, (3, 4, 5), (U8, S8), to_channels_last=True),
        "quantize",
        [
            ("data", ("n", 3, 4, 5), "float32"),
            ("output0", ("n", 4, 5, 3), "uint8"),
            ("output1", ("n", 4, 5, 3), "int8"),
        ],
        60 * (4 + 2),
    ),
    "rotation": (
        RotationSpec(None, 2, 3, 4, Epilogue()),
        "rotation_2x3x4",
        [
            ("data", ("n", 24), "float32"),
            ("factors", (24,), "float32"),
            ("core", (3, 3), "float32"),
            ("output0", ("n", 24), "float32"),
        ],
        24 * (4 + 4),
    ),
    "rows": (
        RowsSpec(None, 6, "layer_norm", Epilogue(outputs=("float32", U8)), 1e-5),
        "layer_norm_6",
        [
            ("data", ("n", 6), "float32"),
            ("scale", (6,), "float32"),
            ("bias", (6,), "float32"),
            ("output0", ("n", 6), "float32"),
            ("output1", ("n", 6), "uint8"),
        ],
        6 * (4 + 4 + 1),
    ),
    "dequantize": (
        DequantizeSpec(None, (4, 5, 3), S8, to_channels_first=True),
        "dequantize",
        [("data", ("n", 4, 5, 3), "int8"), ("output0", ("n", 3, 4, 5), "float32")],
        60 * 5,
    ),
}


@pytest.mark.parametrize("operation", FACTS)
def test_facts_of_a_kernel_without_a_weight(operation: str) -> None:
    spec, name, arguments, moved = FACTS[operation]
    assert spec.operation == operation
    assert spec.name == name
    assert spec.arguments("n") == arguments
    assert spec.moved_bytes() == spec.operations == moved


@pytest.mark.parametrize(
    ("spec", "operation", "name"),
    [
        (ConvSpec(None, 9, 7, 6, 4, (3, 3), U8, TWO, (2, 1), (1, 1, 1, 1)), "conv", "conv2d_3x3_6_4"),
        (ConvSpec(None, 9, 7, 4, 4, (3, 3), U8, TWO, groups=4), "conv", "depthwise_3x3_4"),
        (ConvSpec(None, 9, 7, 1, 1, (3, 3), U8, TWO), "conv", "conv2d_3x3_1_1"),
        (LinearSpec(None, 12, 10, U8, TWO), "linear", "linear_12_10"),
    ],
)
def test_facts_of_a_kernel_with_a_weight(spec: Any, operation: str, name: str) -> None:
    assert (spec.operation, spec.name) == (operation, name)
    channels, out = (spec.out_shape[-1],), ("n", *spec.out_shape)
    assert spec.weighted_arguments("n", 99, "uint8") == [
        ("data", ("n", *spec.in_shape), "uint8"),
        ("weight", (99,), "uint8"),
        ("compensation", channels, "int32"),
        ("scale", channels, "float32"),
        ("bias", channels, "float32"),
        ("residual", out, "int8"),
        ("output0", out, "uint8"),
        ("output1", out, "float32"),
    ]
    assert spec.operations == 2 * spec.macs
    moved = np.prod(spec.in_shape) + 99 + np.prod(spec.out_shape) * (1 + 1 + 4)
    assert spec.moved_bytes(99) == moved


def test_facts_of_a_product() -> None:
    spec = ProductSpec(None, 5, 7, 3, (U8, S8), Epilogue(), transposed=True)
    assert (spec.operation, spec.name, spec.out_shape) == ("product", "product_5_7_3", (5, 3))
    assert spec.arguments("n") == [
        ("left", ("n", 5, 7), "uint8"),
        ("right", ("n", 3, 7), "int8"),
        ("output0", ("n", 5, 3), "float32"),
    ]
    assert (spec.operations, spec.moved_bytes()) == (2 * 5 * 7 * 3, 35 + 21 + 4 * 15)
    with pytest.raises(CompileError, match="both matrices are quantized or none is"):
        ProductSpec(None, 5, 7, 3, (U8, "float32"), Epilogue())
    with pytest.raises(CompileError, match="do not fit into 32 bits"):
        ProductSpec(None, 5, 40_000, 3, (U8, S8), Epilogue())


@pytest.mark.parametrize(("bits", "stored"), [(2, 2), (3, 4), (4, 4), (5, 8), (8, 8)])
def test_weights_are_stored_in_a_power_of_two_of_bits(bits: int, stored: int) -> None:
    assert LinearSpec(None, 4, 4, U8, Epilogue(), bits).storage_bits == stored
