"""Rotations by Hadamard matrices: how far they are from the product of float64 matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tvm.target import Target

from cat_plugin.errors import CompileError
from tests.tvm_backend.kernels.tools import TARGETS, execute
from tvm_backend.kernels.cpu.rotation import reference
from tvm_backend.kernels.registry import lower
from tvm_backend.kernels.spec import Epilogue, QParams, RotationSpec

BYTES = QParams(1 / 8, 128, 0, 255, "uint8")


def sylvester(size):
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def given(spec, rows):
    rng = np.random.default_rng(0)
    data = rng.normal(size=(rows, spec.features)) * rng.uniform(0.01, 30, (rows, 1))
    factors = rng.choice([-1.0, 1.0], spec.features) / math.sqrt(spec.features)
    core = [rng.normal(size=(spec.core, spec.core))] if spec.core > 1 else []
    return [each.astype(np.float32) for each in (data, factors, *core)]


def run(spec, target, arguments):
    dtypes = [np.uint8 if isinstance(kind, QParams) else np.float32 for kind in spec.out_kinds]
    blank = [np.full((len(arguments[0]), spec.features), 77, dtype) for dtype in dtypes]
    target = Target(TARGETS[target])
    return execute(lower(spec, target), target, arguments, blank)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "sizes", [(4, 12, 32), (1, 1, 64), (2, 1, 2), (16, 1, 128), (64, 3, 16), (1, 13, 8), (8, 1, 1), (2, 5, 1)]
)
def test_a_rotation_is_within_a_few_roundings(target, sizes):
    spec = RotationSpec(None, *sizes, Epilogue(outputs=("float32", BYTES)))
    arguments = given(spec, 5)
    data, factors, *core = (each.astype(float) for each in arguments)
    outer, inner = sylvester(spec.outer), sylvester(spec.inner)
    matrix = factors[:, None] * np.kron(np.kron(outer, core[0] if core else np.ones((1, 1))), inner)
    exact = data @ matrix
    np.testing.assert_allclose(reference(spec, *arguments)[0], exact, rtol=1e-5, atol=1e-4)
    found, integers = run(spec, target, arguments)
    stages = 1 + math.log2(spec.outer * spec.inner) + spec.core
    assert (np.abs(found - exact) <= 2.0**-24 * stages * (np.abs(data) @ np.abs(matrix))).all()
    np.testing.assert_array_equal(integers, np.clip(np.rint(found * np.float32(8)) + 128, 0, 255))


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_no_number_is_integer_zero(target):
    spec = RotationSpec(3, 2, 3, 16, Epilogue(outputs=(BYTES,)))
    arguments = given(spec, 3)
    arguments[0][1, 0] = np.nan
    (integers,) = run(spec, target, arguments)
    assert (integers[1] == 0).all()
    assert (integers[[0, 2]] != 0).any()


def test_a_rotation_checks_its_sizes():
    with pytest.raises(CompileError, match="12 is not a power of two"):
        RotationSpec(1, 12, 1, 4, Epilogue())
