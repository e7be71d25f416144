"""Kernels for Arm: compiled here, linked by a cross compiler and run by qemu where these are installed."""

from __future__ import annotations

import platform
import re
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm.target import Target

from tests.tvm_backend.kernels.tools import expected_outputs, random_tensor, random_weight
from tvm_backend.kernels.registry import lower, reference
from tvm_backend.kernels.spec import ConvSpec, Epilogue, GroupedLinearSpec, LinearSpec, QParams

IMAGE = QParams(0.02, 3, 0, 255, "uint8")
SIGNED = QParams(0.02, -3, -128, 127, "int8")
FEW = QParams(0.05, 0, 0, 3, "uint8")
TARGETS = {
    "dotprod": {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon", "+dotprod"]},
    "baseline": {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon"]},
}
RELU = Epilogue((0.0, None), None, (FEW, IMAGE))
SHORTCUT = Epilogue((0.0, None), IMAGE, (SIGNED, "float32"))
ONE = (1, 1, 1, 1)


def layers():
    """Convolutions of every kind and linear layers, signed, unsigned and on grids of rows, at 2, 4 and 8 bits."""
    for bits in (2, 4, 8):
        for given in (IMAGE, SIGNED):
            yield ConvSpec(None, 9, 11, 32, 40, (3, 3), given, RELU, padding=ONE, weight_bits=bits)
            yield ConvSpec(None, 8, 8, 24, 32, (1, 1), given, SHORTCUT, weight_bits=bits)
            yield LinearSpec(None, 70, 37, given, Epilogue(), bits)
        tokens = QParams(1.0, 0, 0, 255, "uint8")
        yield GroupedLinearSpec(None, 70, 37, tokens, Epilogue(), bits, groups=2, tokens=True)
    yield GroupedLinearSpec(None, 70, 37, SIGNED, RELU, 4, groups=5)
    yield ConvSpec(2, 17, 17, 3, 16, (7, 7), IMAGE, RELU, (2, 2), (3, 3, 3, 3))
    yield ConvSpec(None, 9, 9, 12, 18, (3, 2), SIGNED, RELU, (2, 1), (1, 0, 0, 1), (1, 2), groups=3)
    yield ConvSpec(None, 10, 10, 20, 20, (3, 3), IMAGE, RELU, padding=ONE, groups=20)
    yield ConvSpec(None, 7, 7, 512, 160, (3, 3), IMAGE, RELU, padding=ONE)
    yield LinearSpec(16, 64, 1000, IMAGE, Epilogue((None, None), None, (IMAGE,)))


def tools():
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-gcc and qemu-aarch64 (Debian: gcc-aarch64-linux-gnu, qemu-user)")
    return compiler, emulator


def packed(arguments, outputs):
    """The arguments of a call as the runner reads them."""
    parts = [struct.pack("<ii", len(arguments) + len(outputs), len(arguments))]
    for array in (*arguments, *outputs):
        code = {"i": 0, "u": 1, "f": 2}[array.dtype.kind]
        parts.append(struct.pack("<iii", array.ndim, code, 8 * array.itemsize))
        parts.append(struct.pack(f"<{array.ndim}q", *array.shape))
        parts.append(np.ascontiguousarray(array).tobytes())
    return b"".join(parts)


@pytest.mark.parametrize("name", TARGETS)
def test_kernels_equal_the_reference_to_the_bit(name, tmp_path):
    compiler, emulator = tools()
    target = Target(TARGETS[name])
    rng = np.random.default_rng(0)
    functions, calls, wanted = {}, [], []
    for i, spec in enumerate(layers()):
        kernel = lower(spec, target)
        data = random_tensor(spec.input, (spec.batch or 2, *spec.in_shape), rng)
        weight = random_weight(spec.weight_bits, spec.weight_shape, rng)
        arguments, outputs = expected_outputs(kernel, data, weight, rng, reference(spec))
        functions[f"case{i}"] = kernel.prim_func.with_attr("global_symbol", f"case{i}")
        calls.append(packed(arguments, [np.full_like(output, 77) for output in outputs]))
        wanted.append(outputs)
    module = tvm.compile(tvm.IRModule(functions), target=target)
    module.mod.write_to_file(str(tmp_path / "kernels.o"), "o")
    symbols = [f"__tvm_ffi_{function}" for function in functions]
    declared = "".join(f"int {symbol}(void*, Any*, int32_t, Any*);\n" for symbol in symbols)
    (tmp_path / "cases.h").write_text(f"{declared}static Kernel kernels[] = {{{', '.join(symbols)}}};\n")
    (tmp_path / "calls").write_bytes(b"".join(calls))
    runner = Path(__file__).with_name("aarch64_runner.c")
    command = [
        compiler,
        "-O1",
        "-static",
        "-I",
        tmp_path,
        runner,
        tmp_path / "kernels.o",
        "-o",
        tmp_path / "run",
    ]
    subprocess.run(command, check=True)
    subprocess.run([emulator, tmp_path / "run", tmp_path / "calls", tmp_path / "found"], check=True)
    found = (tmp_path / "found").read_bytes()
    for outputs in wanted:
        for output in outputs:
            part, found = found[: output.nbytes], found[output.nbytes :]
            np.testing.assert_array_equal(np.frombuffer(part, output.dtype).reshape(output.shape), output)
    assert found == b""


@pytest.mark.parametrize("given", [IMAGE, SIGNED], ids=["uint8", "int8"])
def test_inner_loop_is_dot_products(given):
    spec = ConvSpec(None, 28, 28, 128, 128, (3, 3), given, RELU, padding=ONE)
    kernel = lower(spec, Target(TARGETS["dotprod"]))
    assert kernel.variant == "neon_dot"
    module = tvm.compile(tvm.IRModule({kernel.name: kernel.prim_func}), target=Target(TARGETS["dotprod"]))
    lines = [line.strip() for line in module.mod.inspect_source("s").splitlines()]
    loops, start = [], 0
    for i, line in enumerate(lines):
        if line.startswith(".LBB"):
            start = i
        elif re.match(r"(b\.|cbn?z|tbn?z)", line) and line.split()[-1] == lines[start].partition(":")[0]:
            loops.append([inner for inner in lines[start + 1 : i] if re.match("[a-z]", inner)])
    inner = [loop for loop in loops if any(line.startswith("sdot") for line in loop)]
    assert inner
    for loop in inner:
        assert not any("[sp" in line for line in loop)
        assert sum(line.startswith("sdot") for line in loop) * 2 >= sum("v" in line for line in loop) - 4


def test_a_whole_network_is_linked(tmp_path):
    """Only the kernels can be run here: there is no TVM runtime for Arm to load the library with."""
    torch = pytest.importorskip("torch")
    if shutil.which("aarch64-linux-gnu-g++") is None:
        pytest.skip("needs aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu)")
    import cat_plugin.graph.op  # noqa: F401
    import tvm_backend
    from cat_plugin.errors import LibraryError
    from tests.tvm_backend import qdq_models as models

    program = models.exported(models.QResNet(4, "pad", width=8), torch.randn(2, 3, 8, 8))
    report = tvm_backend.compile(program, "portable-aarch64", tmp_path / "m.so", cache=False)
    assert [variant["variant"] for variant in report.variants] == ["dotprod", "baseline"]
    assert {variant["machine"] for variant in report.variants} == {"aarch64"}
    assert report.variants[0]["features"] == ["asimddp"]
    assert report.variants[1]["features"] == []
    header = report.path.read_bytes()[:20]
    assert header[:4] == b"\x7fELF"
    assert struct.unpack("<H", header[18:20]) == (183,)
    if platform.machine() != "aarch64":
        with pytest.raises(LibraryError, match="built for aarch64"):
            tvm_backend.load(report.path)


def test_without_a_cross_compiler(monkeypatch, tmp_path):
    from cat_plugin.errors import CompileError
    from tvm_backend import linker

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    other = "aarch64" if platform.machine() != "aarch64" else "x86_64"
    with pytest.raises(CompileError, match=f"apt-get install g.*{other.replace('_', '-')}-linux-gnu"):
        linker.find(other)
