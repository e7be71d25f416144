"""AMX kernels: their arithmetic with the tile instructions emulated in C, and the code that is generated for them."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess

import numpy as np
import pytest
import tvm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tvm.script.ir_builder import tirx as T
from tvm.target import Target

from tests.tvm_backend.kernels.cpu.test_conv2d import IMAGE, convolutions
from tests.tvm_backend.kernels.cpu.test_linear import layers
from tests.tvm_backend.kernels.tools import (
    check_kernel,
    native_features,
    network_layer,
    random_tensor,
    random_weight,
)
from tvm_backend.kernels.cpu import conv2d, linear, tiles
from tvm_backend.kernels.cpu.conv2d_amx import AmxConv
from tvm_backend.kernels.cpu.isa import Amx, Avx512Vnni, select
from tvm_backend.kernels.cpu.linear_amx import AmxLinear
from tvm_backend.kernels.kernel import Kernel
from tvm_backend.kernels.registry import lower
from tvm_backend.kernels.spec import ConvSpec, Epilogue, LinearSpec, QParams

SAPPHIRE_RAPIDS = Target({"kind": "llvm", "mcpu": "sapphirerapids"})
VECTORS_ONLY = Target({"kind": "llvm", "mcpu": "icelake-server"})
SIGNED = QParams(0.02, -3, -128, 127, "int8")

COUNTERS = ("faults", "configurations", "releases", "products")


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    """The library of emulated instructions, its functions visible to compiled kernels."""
    if "avx512_vnni" not in native_features():
        pytest.skip("the vector part of the AMX kernels needs a processor with AVX512-VNNI")
    if (compiler := shutil.which("gcc") or shutil.which("cc")) is None:
        pytest.skip("there is no C compiler for the emulated instructions")
    source = __file__.replace("test_amx.py", "amx_emulator.c")
    library = tmp_path_factory.mktemp("amx") / "libamx_emulator.so"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


@pytest.fixture
def emulated(emulator, monkeypatch):
    """Kernels built in a test call the emulated instructions; returns a function that reads and clears a counter."""

    def call(name, *arguments):
        T.evaluate(T.call_extern("int32", f"emulated_{name}", *arguments))

    monkeypatch.setattr(tiles, "_do", call)

    def counts():
        found = {}
        for name in COUNTERS:
            counter = ctypes.c_int.in_dll(emulator, name)
            found[name], counter.value = counter.value, 0
        return found

    counts()
    return counts


def check(emulated, generator, data, seed, reference):
    rng = np.random.default_rng(seed)
    weight = random_weight(generator.spec.weight_bits, generator.spec.weight_shape, rng)
    check_kernel(Kernel.of(generator, "kernel"), VECTORS_ONLY, data, weight, rng, reference)
    found = emulated()
    assert found["faults"] == 0
    assert found["configurations"] == found["releases"]
    return found


ANY = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@ANY
@given(case=convolutions(), seed=st.integers(0, 2**32 - 1))
def test_any_convolution_equals_the_reference_to_the_bit(emulated, case, seed):
    spec, batch = case
    shape = (batch, spec.height, spec.width, spec.in_channels)
    data = random_tensor(spec.input, shape, np.random.default_rng(seed + 1))
    found = check(emulated, AmxConv(spec, Amx()), data, seed, conv2d.reference)
    assert found["products"] > 0


@ANY
@given(case=layers(), seed=st.integers(0, 2**32 - 1))
def test_any_linear_layer_equals_the_reference_to_the_bit(emulated, case, seed):
    spec, batch = case
    data = random_tensor(spec.input, (batch, spec.in_features), np.random.default_rng(seed + 1))
    if AmxLinear.takes(spec, Amx()):
        found = check(emulated, AmxLinear(spec, Amx()), data, seed, linear.reference)
        assert (found["products"] > 0) == (batch >= 16)


@pytest.mark.parametrize("input_", [IMAGE, SIGNED], ids=["uint8", "int8"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("size", "channels_in", "channels_out", "kernel", "stride"),
    [
        (7, 512, 512, 3, 1),
        (56, 64, 128, 1, 2),
        (14, 96, 576, 1, 1),
        (32, 16, 16, 3, 1),
        (33, 3, 64, 7, 2),
        (14, 160, 64, 1, 1),
    ],
)
def test_layers_of_real_networks(emulated, bits, size, channels_in, channels_out, kernel, stride, input_):
    spec = network_layer(size, channels_in, channels_out, kernel, stride, bits, input_)
    data = random_tensor(input_, (2, size, size, channels_in), np.random.default_rng(1))
    check(emulated, AmxConv(spec, Amx()), data, 2, conv2d.reference)


def assembly(kernel):
    """Lines of the code generated for Sapphire Rapids, without directives."""
    module = tvm.compile(tvm.IRModule({kernel.name: kernel.prim_func}), target=SAPPHIRE_RAPIDS)
    lines = (line.strip() for line in module.mod.inspect_source("s").splitlines())
    return [line for line in lines if re.match(r"[a-z]|\.LBB", line)]


def inner_loops(lines):
    """Bodies of loops without a branch or label in them that multiply tiles."""
    found, start = [], 0
    for i, line in enumerate(lines):
        if line.startswith(".LBB"):
            start = i
        elif line.startswith("j"):
            body = lines[start + 1 : i]
            label = lines[start].partition(":")[0]
            if line.split()[-1] == label and any(inner.startswith("tdpb") for inner in body):
                found.append(body)
            start = i
    return found


@pytest.mark.parametrize("input_", [IMAGE, SIGNED], ids=["uint8", "int8"])
@pytest.mark.parametrize("kind", ["3x3", "strided", "1x1", "linear"])
def test_generated_code(kind, input_):
    product = "tdpbusd" if input_.dtype == "uint8" or kind == "linear" else "tdpbssd"
    out = Epilogue((0.0, None), None, (IMAGE,))
    padding = (1, 1, 1, 1)
    spec = {
        "3x3": ConvSpec(None, 28, 28, 128, 128, (3, 3), input_, out, padding=padding),
        "strided": ConvSpec(None, 28, 28, 128, 256, (3, 3), input_, out, (2, 2), padding),
        "1x1": ConvSpec(None, 14, 14, 960, 160, (1, 1), input_, out),
        "linear": LinearSpec(None, 16384, 100, input_, out),
    }[kind]
    kernel = lower(spec, SAPPHIRE_RAPIDS)
    assert kernel.variant == "amx_int8"
    lines = assembly(kernel)
    names = [line.split()[0] for line in lines]
    # Every pass over the code shapes the tiles once and releases them; one of them may be for a single thread.
    assert 1 <= names.count("ldtilecfg") <= 2
    assert names.count("tilerelease") >= names.count("ldtilecfg")
    products, loads = names.count(product), names.count("tileloadd")
    assert products == loads >= 4
    assert {name for name in names if name.startswith("tdpb")} == {product}
    loops = inner_loops(lines)
    # Short loops are unrolled altogether.
    assert loops or kind != "linear"
    for body in loops:
        assert not any("sp)" in line or "%zmm" in line for line in body)


def test_target_decides():
    spec = ConvSpec(1, 14, 14, 256, 256, (3, 3), IMAGE, Epilogue(), padding=(1, 1, 1, 1))
    assert isinstance(select(SAPPHIRE_RAPIDS), Amx)
    masked = Target({"kind": "llvm", "mcpu": "sapphirerapids", "mattr": ["-amx-int8"]})
    assert select(masked) == Avx512Vnni()
    assert lower(spec, masked).variant == "avx512_vnni"
    # A first layer of three channels fills a small part of a tile.
    narrow = ConvSpec(1, 32, 32, 3, 16, (3, 3), IMAGE, Epilogue(), padding=(1, 1, 1, 1))
    assert lower(narrow, SAPPHIRE_RAPIDS).variant == "avx512_vnni"
    assert lower(spec, SAPPHIRE_RAPIDS).variant == "amx_int8"


def test_a_whole_network_computes_the_same_bits(emulated, monkeypatch, tmp_path):
    torch = pytest.importorskip("torch")
    import cat_plugin.graph.op  # noqa: F401
    import tvm_backend
    from tests.tvm_backend import qdq_models as models
    from tvm_backend import variants
    from tvm_backend.kernels import registry

    torch.manual_seed(0)
    program = models.exported(models.QResNet(4, "conv", width=16), torch.randn(4, 3, 16, 16))
    images = np.random.default_rng(0).normal(size=(17, 3, 16, 16)).astype(np.float32)
    plain = tvm_backend.compile(program, "icelake-server", tmp_path / "plain.so", cache=False)
    wanted = tvm_backend.load(plain.path)(images)
    registry._generator.cache_clear()
    try:
        monkeypatch.setattr(registry, "machine_of", lambda _target: Amx())
        monkeypatch.setattr(variants, "permit_amx", lambda: True)
        tiled = tvm_backend.compile(program, "icelake-server", tmp_path / "tiled.so", cache=False)
        assert [kernel.variant for kernel in tiled.kernels].count("amx_int8") >= 6
        np.testing.assert_array_equal(tvm_backend.load(tiled.path)(images), wanted)
    finally:
        registry._generator.cache_clear()
    found = emulated()
    assert found["faults"] == 0
    assert found["products"] > 0
