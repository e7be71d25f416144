"""Softmax, LayerNorm, RMSNorm and GELU of rows on the emulated device: as near to float64 as on a processor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm

from tests.tvm_backend import cuda_tools
from tvm_backend.kernels.cpu.rows import reference
from tvm_backend.kernels.registry import lower
from tvm_backend.kernels.spec import Epilogue, QParams, RowsSpec

emulated = pytest.mark.skipif(cuda_tools.available() is not None, reason=str(cuda_tools.available()))

BOTH = Epilogue(outputs=("float32", QParams(1 / 64, 3, 0, 255, "uint8")))
CASES = {
    "softmax": RowsSpec(None, 257, "softmax", BOTH),
    "softmax, short": RowsSpec(2, 5, "softmax", BOTH),
    "softmax, long": RowsSpec(3, 1100, "softmax", BOTH),
    "layer_norm": RowsSpec(None, 384, "layer_norm", BOTH, 1e-6),
    "layer_norm, long": RowsSpec(2, 1025, "layer_norm", BOTH, 1e-6),
    "rms_norm": RowsSpec(7, 33, "rms_norm", BOTH, 1e-6),
    "gelu": RowsSpec(None, 40, "gelu", BOTH),
    "gelu_tanh": RowsSpec(3, 40, "gelu_tanh", BOTH),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """For each kernel its arguments, and what they are after a call in each order of threads."""
    folder = tmp_path_factory.mktemp("cuda")
    rng = np.random.default_rng(0)
    calls, names = [], []
    for number, (name, spec) in enumerate(CASES.items()):
        function = lower(spec, cuda_tools.target()).prim_func.with_attr("global_symbol", "main")
        executable = tvm.compile(tvm.IRModule({"main": function}), target=cuda_tools.target())
        library = cuda_tools.export(executable, folder / f"kernel{number}.so")
        data = (3 * rng.normal(size=(spec.batch or 6, spec.features))).astype(np.float32)
        data[1, spec.features // 2] = np.nan
        if spec.batch is None and spec.function == "softmax":
            data[2, 3:] = -np.inf  # masked
            data[3] = -np.inf
        constants = [rng.normal(size=spec.features).astype(np.float32) for _ in spec.constants]
        blank = [np.full(data.shape, 77, dtype) for dtype in (np.float32, np.uint8)]
        for reverse in (False, True):
            calls.append(cuda_tools.Call(library, [data, *constants, *blank], reverse))
            names.append(name)
    found: dict[str, Any] = {}
    for name, call, arrays in zip(names, calls, cuda_tools.run(calls), strict=True):
        found.setdefault(name, (call.arrays[:-2], []))[1].append(arrays[-2:])
    return found


def bound(spec: RowsSpec, exact: np.ndarray, data: np.ndarray, *constants: np.ndarray) -> Any:
    """The errors that the processors' kernels state."""
    step = 2.0**-20
    if spec.function == "softmax":
        distance = data.max(axis=1, keepdims=True) - np.maximum(data, -1e4)
        return exact * (step + 2.0**-24 * distance) + 2.0**-120
    if spec.function == "layer_norm":
        gamma, beta = np.abs(constants)
        return step * (gamma + np.abs(exact) + 2 * beta)
    if spec.function == "rms_norm":
        return step * np.abs(exact)
    return step * np.maximum(1, np.abs(data))


@emulated
@pytest.mark.parametrize("name", CASES)
def test_is_within_a_few_roundings(name: str, results: dict[str, Any]) -> None:
    spec, (arguments, runs) = CASES[name], results[name]
    with np.errstate(invalid="ignore"):
        exact, _ = reference(spec, *arguments)
        finite = np.isfinite(exact)
        allowed = bound(spec, exact, *arguments)
    assert 0 < finite.sum() < finite.size
    for real, integers in runs:
        assert (np.isfinite(real) == finite).all()
        assert (np.abs(real - exact)[finite] <= allowed[finite]).all()
        with np.errstate(invalid="ignore"):
            levels = np.clip(np.rint(np.where(finite, real, -3 / 64) * np.float32(64)) + 3, 0, 255)
        np.testing.assert_array_equal(integers, levels)
