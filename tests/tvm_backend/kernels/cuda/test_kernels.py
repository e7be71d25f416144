"""The integer CUDA kernels against the references of the CPU kernels, bit for bit, on the emulated device."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm

from cat_plugin.errors import CompileError
from tests.tvm_backend import cuda_tools
from tests.tvm_backend.kernels.tools import random_tensor, random_weight
from tvm_backend import cuda_build
from tvm_backend.kernels.cuda.packing import TileLayout
from tvm_backend.kernels.cuda.tiles import choose_tile
from tvm_backend.kernels.kernel import Kernel
from tvm_backend.kernels.registry import lower, reference
from tvm_backend.kernels.spec import (
    ConcatSpec,
    ConvSpec,
    DequantizeSpec,
    ElementwiseSpec,
    Epilogue,
    LinearSpec,
    PoolSpec,
    ProductSpec,
    QParams,
    QuantizeSpec,
    SubsampleSpec,
)

emulated = pytest.mark.skipif(cuda_tools.available() is not None, reason=str(cuda_tools.available()))

U8 = QParams(0.05, 7, 0, 255, "uint8")
S8 = QParams(0.04, -3, -128, 127, "int8")
U2 = QParams(0.3, 1, 0, 3, "uint8")
S4 = QParams(0.11, 0, -8, 7, "int8")
RELU = Epilogue((0.0, None), None, (S8,))
COARSE = Epilogue(outputs=(QParams(0.5, -3, -128, 127, "int8"), "float32"))
SAME = (1, 1, 1, 1)

WEIGHTED: dict[str, tuple[Any, str]] = {
    "mma 3x3": (ConvSpec(2, 8, 8, 16, 16, (3, 3), U8, RELU, padding=SAME), "sm_90"),
    "mma stride 2, residual, two outputs": (
        ConvSpec(
            None, 8, 8, 16, 64, (3, 3), S8, Epilogue((None, None), S4, (U8, "float32"), S8), (2, 2), SAME
        ),
        "sm_90",
    ),
    "mma three channels, 4 bits": (
        ConvSpec(2, 9, 7, 3, 24, (3, 3), U8, RELU, padding=SAME, weight_bits=4),
        "sm_90",
    ),
    "mma 2 bits, uneven": (
        ConvSpec(2, 9, 7, 12, 40, (3, 2), U2, RELU, (2, 1), (0, 1, 1, 0), weight_bits=2),
        "sm_90",
    ),
    "mma dilation, float residual": (
        ConvSpec(3, 9, 9, 20, 72, (3, 3), S8, Epilogue((None, 1.5), "float32"), (1, 1), (2, 2, 2, 2), (2, 2)),
        "sm_90",
    ),
    "mma split sums": (ConvSpec(1, 5, 5, 128, 40, (3, 3), U8, RELU, padding=SAME), "sm_90"),
    "mma split sums, residual": (
        ConvSpec(2, 7, 7, 64, 64, (3, 3), S8, Epilogue((None, None), S4, (U8, "float32"), S8), (2, 2), SAME),
        "sm_90",
    ),
    "mma split sums, tiles end before 64 channels": (ConvSpec(1, 4, 5, 256, 96, (1, 1), U8, RELU), "sm_90"),
    "mma split sums, linear, 2 bits": (LinearSpec(3, 1040, 70, U8, Epilogue(), weight_bits=2), "sm_90"),
    "mma split sums, linear, 4 bits, odd": (LinearSpec(17, 333, 33, S8, RELU, weight_bits=4), "sm_90"),
    "mma padding": (ConvSpec(None, 6, 5, 32, 48, (3, 3), U8, RELU, padding=SAME), "sm_90"),
    "mma dilation, residual": (
        ConvSpec(
            None, 9, 9, 16, 64, (3, 3), S8, Epilogue((None, None), S4, (U8, "float32")), (2, 1), SAME, (2, 2)
        ),
        "sm_90",
    ),
    "mma wide tile, padding": (
        ConvSpec(132, 16, 16, 16, 128, (1, 5), S8, RELU, padding=(0, 2, 0, 2)),
        "sm_90",
    ),
    "mma linear, pieces of 16": (LinearSpec(None, 336, 70, U8, Epilogue()), "sm_80"),
    "mma 1x1": (ConvSpec(None, 5, 5, 64, 32, (1, 1), U8, RELU), "sm_80"),
    "dp4a 3x3, 2 bits": (
        ConvSpec(2, 9, 7, 12, 40, (3, 3), U8, RELU, (2, 1), (0, 1, 1, 0), weight_bits=2),
        "sm_75",
    ),
    "dp4a signed": (ConvSpec(None, 6, 6, 16, 16, (3, 3), S8, RELU, padding=SAME), "sm_75"),
    "mma linear": (LinearSpec(5, 100, 10, U8, Epilogue()), "sm_90"),
    "dp4a linear, 4 bits": (LinearSpec(None, 64, 33, S8, Epilogue(), weight_bits=4), "sm_75"),
    "mma linear, 3 bits, odd": (LinearSpec(None, 77, 130, S8, RELU, weight_bits=3), "sm_90"),
    "depthwise": (ConvSpec(2, 9, 7, 12, 12, (3, 3), U8, RELU, (2, 2), SAME, groups=12), "sm_90"),
    "grouped": (ConvSpec(None, 5, 7, 12, 24, (3, 3), S8, RELU, padding=SAME, groups=3), "sm_90"),
}

PLAIN: dict[str, Any] = {
    "add": ElementwiseSpec(None, (5, 5, 6), (U8, S8), RELU),
    "requantize": ElementwiseSpec(2, (33,), (U8,), Epilogue((0.0, 6.0), None, (U2, S8))),
    "add float": ElementwiseSpec(2, (33,), (U8, "float32"), RELU),
    "concat": ConcatSpec(None, (3, 2), (5, 1, 4), (U8, S8, S8), RELU),
    "concat rows": ConcatSpec(2, (), (5, 3), (S8, U8), Epilogue(outputs=(S8,))),
    "subsample": SubsampleSpec(None, 7, 5, 4, (2, 2), 2, 3, U8),
    "quantize images": QuantizeSpec(None, (3, 6, 5), (U8, S4), to_channels_last=True),
    "dequantize images": DequantizeSpec(2, (4, 3, 5), S8, to_channels_first=True),
    "max pool": PoolSpec("max", None, 9, 7, 6, (3, 3), (2, 2), S8, Epilogue(outputs=(S8,)), SAME),
    "average pool": PoolSpec(
        "avg", 2, 8, 8, 5, (3, 2), (2, 2), U8, RELU, SAME, ceil_mode=True, count_include_pad=False
    ),
    "average pool with padding": PoolSpec(
        "avg", 2, 8, 8, 5, (3, 3), (2, 2), S8, Epilogue((None, None), S8, (U8,)), SAME, ceil_mode=True
    ),
    "queries with keys": ProductSpec(None, 70, 64, 66, (S8, U8), COARSE, transposed=True),
    "queries with keys, words": ProductSpec(2, 33, 20, 9, (S4, S8), COARSE, transposed=True),
    "attention with values": ProductSpec(3, 65, 130, 72, (U8, S8), Epilogue()),
    "attention with values, bytes": ProductSpec(None, 17, 77, 30, (U8, U2), COARSE),
    "many pairs": ProductSpec(132, 65, 16, 65, (U8, U8), Epilogue()),
    "pairs of bytes": ProductSpec(2, 18, 7, 5, (S8, U8), Epilogue((0.0, 2.0)), transposed=True),
    "global average": PoolSpec("avg", None, 6, 5, 20, (6, 5), (1, 1), U8, Epilogue()),
}


def build(spec: Any, arch: str) -> tuple[Kernel, Any]:
    target = tvm.target.Target({"kind": "cuda", "arch": arch}, host={"kind": "llvm"})
    kernel = lower(spec, target)
    module = tvm.IRModule({"main": kernel.prim_func.with_attr("global_symbol", "main")})
    return kernel, tvm.compile(module, target=target)


def weighted_case(spec: Any, kernel: Kernel) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Arguments of a convolution or linear kernel, results last, and what it should make of them."""
    rng = np.random.default_rng(0)
    computed = reference(spec)
    data = random_tensor(spec.input, (spec.batch or 3, *spec.in_shape), rng)
    weight = random_weight(spec.weight_bits, spec.weight_shape, rng)
    channels = weight.shape[0]
    spread = np.sqrt(weight[0].size) * np.abs(weight).max() * (spec.input.qmax - spec.input.qmin) / 4
    scale = (rng.uniform(0.1, 2, channels) / spread).astype(np.float32)
    bias = rng.normal(size=channels).astype(np.float32)
    kind, residual = spec.epilogue.residual, None
    if kind is not None:
        blank = np.zeros(1, np.float32 if kind == "float32" else kind.dtype)
        shape = computed(spec, data, weight, scale, bias, blank)[0].shape
        residual = random_tensor(kind, shape, rng)
    expected = list(computed(spec, data, weight, scale, bias, residual))
    arguments = [data, kernel.pack_weight(weight), kernel.compensation(weight), scale, bias]
    return [*arguments, *([] if residual is None else [residual])], expected


def plain_case(spec: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Arguments of a kernel without a weight, and what it should make of them."""
    rng = np.random.default_rng(1)
    inputs = [random_tensor(kind, (spec.batch or 3, *shape), rng) for _, shape, kind in spec.reads]
    if isinstance(spec, QuantizeSpec):
        inputs = [5 * array for array in inputs]  # beyond what is stored
        for place, value in ((1, np.nan), (2, np.inf), (4, -np.inf)):
            inputs[0].reshape(-1)[place::7] = value
    return inputs, list(reference(spec)(spec, *inputs))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """All kernels, built, and run in both orders of threads in one process: (found, expected) of each result."""
    folder = tmp_path_factory.mktemp("cuda")
    calls, cases = [], []
    everything = WEIGHTED | {name: (spec, "sm_90") for name, spec in PLAIN.items()}
    for number, (name, (spec, arch)) in enumerate(everything.items()):
        kernel, executable = build(spec, arch)
        arguments, expected = weighted_case(spec, kernel) if name in WEIGHTED else plain_case(spec)
        library = cuda_tools.export(executable, folder / f"kernel{number}.so")
        blank = [np.full_like(np.ascontiguousarray(array), 77) for array in expected]
        given = [np.ascontiguousarray(array) for array in arguments]
        for reverse in (False, True):
            calls.append(cuda_tools.Call(library, [*given, *blank], reverse))
            cases.append((name, expected))
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for (name, expected), arrays in zip(cases, cuda_tools.run(calls), strict=True):
        found.setdefault(name, []).extend(zip(arrays[-len(expected) :], expected, strict=True))
    return found


@emulated
@pytest.mark.parametrize("name", [*WEIGHTED, *PLAIN])
def test_equals_the_reference_to_the_bit(name: str, results: dict[str, Any]) -> None:
    assert len(results[name]) >= 2
    for found, expected in results[name]:
        assert len(np.unique(expected)) > 1
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_weights_have_their_own_bits(bits: int) -> None:
    layout = TileLayout(channels=100, products=130, bits=bits)
    weight = random_weight(bits, (100, 130), np.random.default_rng(0))
    packed = layout.pack(weight)
    assert packed.size == layout.length == 2 * 3 * 64 * 64 * bits // 8 + (128 if bits < 8 else 0)


def test_weights_that_span_too_much_are_refused() -> None:
    layout = TileLayout(channels=4, products=8, bits=2)
    with pytest.raises(CompileError, match="span"):
        layout.pack(np.array([[3, 0, 0, 0, -2, 0, 0, 0]] * 4))


def test_tiles_suit_the_product() -> None:
    assert choose_tile(None, 16, True).columns == 16
    assert choose_tile(49, 512, True, chunks=72).splits == 8
    assert choose_tile(49, 512, True, chunks=8).splits == 4
    assert choose_tile(49, 512, False, chunks=72).splits == 1
    assert choose_tile(16 * 56 * 56, 128, True).columns == 128
    assert choose_tile(16 * 56 * 56, 128, False).columns == 64


def test_architectures_without_integer_products_are_refused() -> None:
    spec = LinearSpec(1, 8, 8, U8, Epilogue())
    for arch in ("sm_60", "sm_52"):
        with pytest.raises(CompileError, match="sm_61"):
            lower(spec, tvm.target.Target({"kind": "cuda", "arch": arch}))


@pytest.mark.parametrize(("name", "instruction"), [("mma 3x3", "IMMA.16832"), ("dp4a 3x3, 2 bits", "IDP.4A")])
def test_disassembly(name: str, instruction: str, tmp_path: Path) -> None:
    tool = os.environ.get("CUOBJDUMP") or shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("cuobjdump is not installed; set CUOBJDUMP to its path")
    try:
        cuda_build.find_nvcc()
    except CompileError:
        pytest.skip("nvcc is not installed")
    spec, arch = WEIGHTED[name]
    (source,) = cuda_build.sources(build(spec, arch)[1])
    image = tmp_path / "kernel.fatbin"
    image.write_bytes(cuda_build.compile_source(source, arch)[1])
    sass = subprocess.run(
        [tool, "--dump-sass", str(image)], capture_output=True, text=True, check=True
    ).stdout
    assert instruction in sass
    assert "LDL" not in sass
