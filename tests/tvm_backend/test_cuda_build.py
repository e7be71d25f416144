"""Compiling CUDA code where the library is built: images, errors, resources, disassembly."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import tvm

from cat_plugin.errors import CompileError
from tests.tvm_backend import cuda_tools
from tvm_backend import cuda_build
from tvm_backend.kernels.cluster_affine.kernel import OPS, ClusterAffineSpec, lower

SPEC = ClusterAffineSpec(OPS[0], 1000, 64, 50)


def nvcc_missing() -> bool:
    try:
        cuda_build.find_nvcc()
    except CompileError:
        return True
    return False


needs_nvcc = pytest.mark.skipif(nvcc_missing(), reason="nvcc is not installed")


@pytest.fixture(scope="module")
def executable() -> object:
    function = lower(SPEC, cuda_tools.target()).with_attr("global_symbol", "main")
    return tvm.compile(tvm.IRModule({"main": function}), target=cuda_tools.target())


@needs_nvcc
def test_library_holds_machine_code_instead_of_source(executable: object, tmp_path: Path) -> None:
    path = tmp_path / "kernel.so"
    executable.export_library(str(path), fpack_imports=cuda_build.pack_imports("sm_90"))  # type: ignore[attr-defined]
    data = path.read_bytes()
    assert b"__launch_bounds__" not in data
    assert struct.pack("<I", 0xBA55ED50) in data  # the magic number of a fat binary


@needs_nvcc
def test_kernels_keep_their_sums_in_registers(executable: object) -> None:
    (source,) = cuda_build.sources(executable)
    found = cuda_build.resources(source, "sm_90")
    assert len(found) == 2
    for kernel in found.values():
        assert kernel["stack"] == kernel["spill_stores"] == kernel["spill_loads"] == 0
        assert kernel["shared"] <= 48 * 1024
        assert kernel["registers"] * 256 <= 65536


@needs_nvcc
def test_broken_source_is_reported() -> None:
    with pytest.raises(CompileError, match="nvcc failed"):
        cuda_build.compile_source("this is no CUDA", "sm_90")


def test_missing_nvcc_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(CompileError, match="CUDA toolkit"):
        cuda_build.find_nvcc()


def test_architecture_is_asked_for() -> None:
    assert cuda_build.architecture(tvm.target.Target({"kind": "cuda", "arch": "sm_80"})) == "sm_80"
    with pytest.raises(CompileError, match="sm_90"):
        cuda_build.architecture(tvm.target.Target({"kind": "llvm"}))


def _record(*strings: bytes) -> bytes:
    return b"".join(struct.pack("<Q", len(item)) + item for item in strings)


def _blob(body: bytes) -> bytes:
    return struct.pack("<Q", len(body)) + body


def test_embed_replaces_every_source_and_nothing_else() -> None:
    """Two CUDA modules between others, one of which has the word cuda in its data."""
    first, second = _record(b"cuda", b"table", b"source one"), _record(b"cuda", b"", b"source two")
    before = _record(b"_lib", b"const", b"text with " + _record(b"cuda") + b"inside it")
    blob = _blob(before + _record(b"cuda", first) + _record(b"cuda", second) + b"tail")
    seen = []

    def compiler(source: str, arch: str) -> tuple[str, bytes]:
        seen.append((source, arch))
        return "fatbin", source.upper().encode() * 3

    got = cuda_build.embed(blob, "sm_90", compiler)
    assert seen == [("source one", "sm_90"), ("source two", "sm_90")]
    new_first = _record(b"fatbin", b"table", b"SOURCE ONE" * 3)
    new_second = _record(b"fatbin", b"", b"SOURCE TWO" * 3)
    assert got == _blob(before + _record(b"cuda", new_first) + _record(b"cuda", new_second) + b"tail")


def test_embed_leaves_compiled_modules_alone() -> None:
    blob = _blob(_record(b"cuda", _record(b"fatbin", b"table", b"image")))
    assert cuda_build.embed(blob, "sm_90", lambda *_: pytest.fail("nothing to compile")) == blob


@needs_nvcc
def test_disassembly(executable: object, tmp_path: Path) -> None:
    """The kernel for many rows multiplies in registers and reads shared memory 16 bytes at a time."""
    tool = os.environ.get("CUOBJDUMP") or shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("cuobjdump is not installed; set CUOBJDUMP to its path")
    (source,) = cuda_build.sources(executable)
    image = tmp_path / "kernels.fatbin"
    image.write_bytes(cuda_build.compile_source(source, "sm_90")[1])
    sass = subprocess.run(
        [tool, "--dump-sass", str(image)], capture_output=True, text=True, check=True
    ).stdout
    many = sass[sass.index("Function : main_kernel_1") :].split("Function : main_kernel\n")[0]
    assert many.count("FFMA") >= 4 * 13 * 8
    assert many.count("LDS.128") >= 17 * 2
    assert "LDG.E.128" in many
    assert "LDL" not in many
    assert "STL" not in many
