"""AVX-VNNI-INT8: its kernels, run on any AVX-VNNI processor with a stand-in for the one instruction, and their code."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm.target import Target

from tests.tvm_backend.kernels.cpu.test_conv2d import convolutions
from tests.tvm_backend.kernels.cpu.test_linear import layers
from tests.tvm_backend.kernels.tools import (
    check_kernel,
    execute,
    native_features,
    random_tensor,
    random_weight,
)
from tvm_backend.kernels import registry, tir
from tvm_backend.kernels.cpu.isa import AvxVnni, AvxVnniInt8
from tvm_backend.kernels.kernel import Kernel
from tvm_backend.kernels.spec import ConvSpec, Epilogue, KernelSpec, LinearSpec, ProductSpec, QParams
from tvm_backend.kernels.tir import Expr

SIGNED = QParams(0.02, -3, -128, 127, "int8")
IMAGE = QParams(0.02, 3, 0, 255, "uint8")
VNNI = Target({"kind": "llvm", "mcpu": "haswell", "mattr": ["+avxvnni"]})
ARROW_LAKE = Target({"kind": "llvm", "mcpu": "arrowlake"})
ONE = (1, 1, 1, 1)

needs_vnni = pytest.mark.skipif("avx_vnni" not in native_features(), reason="needs AVX-VNNI")


@dataclass(frozen=True)
class StandIn(AvxVnniInt8):
    """Signed products as a difference of unsigned ones: ``(x + 128) w - 128 w``."""

    features: ClassVar[tuple[str, ...]] = AvxVnni.features

    def dot(self, sums: Expr, activations: Expr, weights: Expr) -> Expr:
        if tir.dtype_of(activations) != "int8":
            return super().dot(sums, activations, weights)
        unsigned, offset = f"uint8x{self.unit}", tir.constant(128, "uint8", self.unit)
        turned = tir.reinterpret(unsigned, activations) ^ offset
        nothing = tir.constant(0, "int32", self.lanes)
        return super().dot(sums, turned, weights) - super().dot(nothing, offset, weights)


def lowered(spec: KernelSpec) -> Kernel:
    """The kernel for the stand-in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "machine_of", lambda target: StandIn())
        return registry.lower(spec, VNNI)


@needs_vnni
@settings(max_examples=40, deadline=None)
@given(case=convolutions() | convolutions(depthwise=True) | layers(), seed=st.integers(0, 2**32 - 1))
def test_any_layer_equals_the_reference_to_the_bit(case, seed):
    spec, batch = case
    rng = np.random.default_rng(seed)
    data = random_tensor(spec.input, (batch, *spec.in_shape), rng)
    weight = random_weight(spec.weight_bits, spec.weight_shape, rng)
    check_kernel(lowered(spec), VNNI, data, weight, rng, registry.reference(spec))


@needs_vnni
@pytest.mark.parametrize("low", [-128, 127])
def test_products_of_signed_matrices_equal_the_reference_to_the_bit(low):
    """Extremes do not saturate, and padding of the inner axis counts nothing."""
    spec = ProductSpec(None, 13, 257, 64, (SIGNED, SIGNED), Epilogue(outputs=("float32", SIGNED)))
    rng = np.random.default_rng(0)
    left, right = np.full((6, 13, 257), low, np.int8), random_tensor(SIGNED, (6, 257, 64), rng)
    expected = registry.reference(spec)(spec, left, right)
    blank = [np.full_like(array, 77) for array in expected]
    for found, wanted in zip(execute(lowered(spec), VNNI, [left, right], blank), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("kind", [SIGNED, IMAGE], ids=["int8", "uint8"])
@pytest.mark.parametrize(
    "spec",
    [
        ConvSpec(None, 28, 28, 128, 128, (3, 3), SIGNED, Epilogue(), padding=ONE),
        ConvSpec(None, 28, 28, 128, 128, (1, 1), SIGNED, Epilogue()),
        ConvSpec(None, 28, 28, 64, 64, (3, 3), SIGNED, Epilogue(), padding=ONE, groups=64),
        LinearSpec(16, 256, 128, SIGNED, Epilogue()),
    ],
    ids=["3x3", "1x1", "depthwise", "linear"],
)
def test_bytes_are_multiplied_with_the_sign_that_they_have(spec, kind):
    """By one instruction, and nothing is turned on the way."""
    kernel = registry.lower(replace(spec, input=kind), ARROW_LAKE)
    assert kernel.generator.isa == AvxVnniInt8()
    module = tvm.compile(tvm.IRModule({kernel.name: kernel.prim_func}), target=ARROW_LAKE)
    code = module.mod.inspect_source("s")
    used = set(re.findall(r"vpdpb\w+", code))
    assert used == ({"vpdpbssd"} if kind is SIGNED else {"vpdpbusd"})
    assert not re.findall(r"xorl?\s+\$-?2139062144", code), "no bits are turned"
