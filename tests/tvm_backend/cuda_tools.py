"""Build CUDA libraries whose kernels run in an emulator, and run them through TVM's own CUDA runtime.

The emulator stands in for the driver (``libcuda.so.1``, ``libcudart.so.13``), so host code, launches, parameters, memory
and the virtual machine are those of a real run; only the device is not.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm.target import Target

from tvm_backend import cuda_build

HERE = Path(__file__).parent / "cuda_emulator"
TARGET = {"kind": "cuda", "arch": "sm_90"}
_FLAGS = ["-O1", "-std=c++17", "-shared", "-fPIC", "-w", "-fno-strict-aliasing", "-ffp-contract=off"]
_CHECKS = ["-fsanitize=kernel-address"]
_CHECKS += [
    f"--param=asan-{what}" for what in ("instrumentation-with-call-threshold=0", "stack=0", "globals=0")
]
"""The compiler calls the emulator before each access to memory."""


def available() -> str | None:
    """Why the emulator cannot be used here, or None."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        return "the CUDA emulator needs Linux and g++"
    library = Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"
    return None if library.exists() else "this TVM wheel has no CUDA runtime"


def target() -> Target:
    """A CUDA target that needs no GPU to build for."""
    return Target(TARGET, host={"kind": "llvm"})


def _root() -> Path:
    root = Path(tempfile.gettempdir()) / f"cat-cuda-emulator-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    return root


def _build(name: str, inputs: list[Path], *options: str) -> Path:
    """Compile once for each content."""
    digest = hashlib.sha256(repr(options).encode())
    for path in [*inputs, *sorted(HERE.rglob("*.h"))]:
        digest.update(path.read_bytes())
    folder = _root() / digest.hexdigest()[:24]
    result = folder / name
    if not result.exists():
        folder.mkdir(exist_ok=True)
        staging = folder / f"{name}.{os.getpid()}"
        subprocess.run(
            ["g++", *_FLAGS, *options, "-o", str(staging), *map(str, inputs), "-ldl"], check=True, timeout=300
        )
        os.replace(staging, result)
    return result


@functools.cache
def driver_folder() -> Path:
    """Where the stand-ins for the CUDA libraries lie; for LD_LIBRARY_PATH."""
    driver = _build("libcuda.so.1", [HERE / "driver.cpp"], "-Wl,-soname,libcuda.so.1")
    script = f"-Wl,--version-script={HERE / 'runtime.map'}"
    runtime = _build("libcudart.so.13", [HERE / "driver.cpp"], "-Wl,-soname,libcudart.so.13", script)
    folder = _root() / f"{driver.parent.name[:8]}{runtime.parent.name[:8]}"
    folder.mkdir(exist_ok=True)
    for library in (driver, runtime):
        if not (folder / library.name).exists():
            shutil.copy(library, folder / library.name)
    return folder


def emulate(source: str, arch: str) -> tuple[str, bytes]:
    """Compile CUDA source for the emulator; a stand-in for :func:`tvm_backend.cuda_build.compile_source`."""
    kernels = dict.fromkeys(
        re.findall(r'extern "C" __global__ void(?: __launch_bounds__\([^)]*\))? (\w+)\(', source)
    )
    wrappers = "".join(
        f'extern "C" void cat_emulated_{name}(const unsigned* size, void** parameters) {{\n'
        f'  cat::launch("{name}", {name}, {{size[0], size[1], size[2]}}, {{size[3], size[4], size[5]}}, parameters);\n}}\n'
        f'extern "C" void** cat_kept_{name}(void** parameters) {{ return cat::keep({name}, parameters); }}\n'
        for name in kernels
    )
    file = _root() / f"{hashlib.sha256(source.encode()).hexdigest()[:24]}.cpp"
    # C++ wants alignment in front of storage.
    source = re.sub(r"__shared__ (alignas\(\d+\))", r"\1 __shared__", source)
    text = f'#include "{HERE / "emulator.h"}"\n{cuda_build.with_prelude(source)}\n{wrappers}'
    staging = file.with_suffix(f".{os.getpid()}")
    staging.write_text(text)
    os.replace(staging, file)
    library = _build(f"{file.stem}.so", [file], f"-I{HERE / 'include'}", *_CHECKS)
    return "cubin", str(library).encode() + b"\0"


def export(executable: Any, path: Path) -> Path:
    """Write a library whose kernels run in the emulator."""
    executable.export_library(str(path), fpack_imports=cuda_build.pack_imports("sm_90", emulate))
    return path


_RUNNER = """
import ctypes, os, pathlib, sys
import numpy as np
import tvm
import tvm.runtime.vm
# The runtime-only mode of TVM does not load this by itself.
ctypes.CDLL(str(pathlib.Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"))
folder, name, kind = sys.argv[1:4]
device = tvm.cuda(0)
loaded = {}
with open(f"{folder}/calls") as lines:
    calls = [line.rstrip().split("\\t") for line in lines]
for number, (library, order) in enumerate(calls):
    os.environ["CAT_EMULATOR_ORDER"] = order
    if library not in loaded:
        module = tvm.runtime.load_module(library)
        loaded[library] = module if kind == "kernel" else tvm.runtime.vm.VirtualMachine(module, device)
    function = loaded[library][name]
    given = np.load(f"{folder}/given{number}.npz")
    tensors = [tvm.runtime.tensor(given[f"arr_{i}"], device) for i in range(len(given.files))]
    found = function(*tensors)
    if kind == "kernel":
        found = tensors
    found = [found.numpy()] if hasattr(found, "numpy") else [item.numpy() for item in found]
    np.savez(f"{folder}/found{number}.npz", *found)
"""


@dataclass(frozen=True)
class Call:
    """One call on the emulated device: a library from :func:`export`, arguments, and the order of threads."""

    library: Path
    arrays: list[np.ndarray]
    reverse: bool = False


def run(calls: list[Call], name: str = "main", kind: str = "kernel") -> list[list[np.ndarray]]:
    """Run calls one after the other on the emulated device, in a process of their own.

    Parameters
    ----------
    calls : list of Call
        What to call; ``reverse`` runs threads and blocks against the order of their index.
    name : str
        The function.
    kind : {"kernel", "vm"}
        Whether results are arguments, or returned by a Relax function.

    Returns
    -------
    list of list of ndarray
        For each call all arguments afterwards, or what was returned.
    """
    with tempfile.TemporaryDirectory() as folder:
        lines = [f"{call.library}\t{'reverse' if call.reverse else 'forward'}\n" for call in calls]
        Path(folder, "calls").write_text("".join(lines))
        for number, call in enumerate(calls):
            np.savez(f"{folder}/given{number}.npz", *call.arrays)
        environment = dict(os.environ, LD_LIBRARY_PATH=str(driver_folder()), TVM_USE_RUNTIME_LIB="1")
        done = subprocess.run(
            [sys.executable, "-c", _RUNNER, folder, name, kind],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if done.returncode != 0:
            raise AssertionError(f"the emulated run failed ({done.returncode}):\n{done.stderr[-3000:]}")
        results = []
        for number in range(len(calls)):
            with np.load(f"{folder}/found{number}.npz") as loaded:
                results.append([loaded[f"arr_{i}"] for i in range(len(loaded.files))])
        return results
