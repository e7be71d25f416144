"""CUDA code is compiled where the library is built, so that it runs where there is no compiler.

TVM puts CUDA *source* into a library and compiles it at load, which needs NVRTC or nvcc, and Python, on every machine
that runs it.  Here nvcc compiles it at export to a fat binary: machine code for the given architecture, and PTX for
later ones, which the driver translates.  No GPU and no driver is needed for that.  The library's import blob is a
sequence of length-prefixed strings; the record of a CUDA module holds its format, its function table and the code, of
which the first and the last are replaced.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cat_plugin.errors import CompileError

__all__ = [
    "architecture",
    "compile_source",
    "embed",
    "find_nvcc",
    "pack_imports",
    "resources",
    "sources",
    "with_prelude",
]

_log = logging.getLogger("cat_plugin")
_FLAGS = ("-O3", "-std=c++17", "--fmad=true", "-Xptxas=--register-usage-level=10")
Compiler = Callable[[str, str], tuple[str, bytes]]
"""From source and architecture to a format that ``cuModuleLoadData`` knows, and the image."""


def find_nvcc() -> str:
    """The path of nvcc.

    Returns
    -------
    str
        From ``$CUDA_HOME``, the path, or ``/usr/local/cuda``.

    Raises
    ------
    CompileError
        There is none.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [str(Path(home) / "bin" / "nvcc")] if home else []
    candidates += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    raise CompileError(
        "no nvcc was found to compile CUDA kernels with; install the CUDA toolkit (12 or later) and set CUDA_HOME, "
        "or compile for a CPU target. A GPU is not needed to compile"
    )


def architecture(target: Any) -> str:
    """The ``sm_NN`` of a CUDA target.

    Parameters
    ----------
    target : tvm.target.Target
        Such as ``Target({"kind": "cuda", "arch": "sm_90"})``.

    Raises
    ------
    CompileError
        The target does not say; it could only be guessed.
    """
    arch = str(target.attrs.get("arch", "") or "")
    if not re.fullmatch(r"sm_\d+[af]?", arch):
        raise CompileError(
            f"the CUDA target gives no architecture (arch={arch!r}); name the GPU's, "
            'for example {"kind": "cuda", "arch": "sm_90"} for an H100'
        )
    return arch


def with_prelude(source: str) -> str:
    """CUDA source with the device functions that it calls in front of it."""
    from tvm_backend.kernels.cuda.prelude import PRELUDE

    return PRELUDE + source if "cat_" in source else source


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(f"nvcc failed: {' '.join(command)}\n{done.stderr.strip()[-4000:]}")
    return done.stderr


def compile_source(source: str, arch: str) -> tuple[str, bytes]:
    """Compile CUDA source to a fat binary.

    Parameters
    ----------
    source : str
        What TVM generated.
    arch : str
        ``sm_90`` and the like; PTX of the same level goes with the machine code.

    Returns
    -------
    format : str
        ``"fatbin"``.
    image : bytes
        What ``cuModuleLoadData`` takes.

    Raises
    ------
    CompileError
        nvcc is missing or refuses the source.
    """
    nvcc, number = find_nvcc(), arch.removeprefix("sm_")
    with tempfile.TemporaryDirectory(prefix="cat-cuda-") as folder:
        file, image = Path(folder) / "kernels.cu", Path(folder) / "kernels.fatbin"
        file.write_text(with_prelude(source), encoding="utf-8")
        code = f"-gencode=arch=compute_{number},code=[sm_{number},compute_{number}]"
        _run([nvcc, "--fatbin", *_FLAGS, code, "-o", str(image), str(file)])
        return "fatbin", image.read_bytes()


def resources(source: str, arch: str) -> dict[str, dict[str, int]]:
    """What each kernel takes, as ptxas reports it.

    Parameters
    ----------
    source : str
        CUDA source.
    arch : str
        ``sm_90`` and the like.

    Returns
    -------
    dict
        For each kernel ``registers``, ``shared`` (bytes), ``stack``, ``spill_stores`` and ``spill_loads`` (bytes).
    """
    with tempfile.TemporaryDirectory(prefix="cat-cuda-") as folder:
        file = Path(folder) / "kernels.cu"
        file.write_text(with_prelude(source), encoding="utf-8")
        report = _run(
            [find_nvcc(), "--cubin", *_FLAGS, f"-arch={arch}", "-Xptxas=-v", "-o", f"{folder}/k", str(file)]
        )
    found: dict[str, dict[str, int]] = {}
    name = ""
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            name = match[1]
            found[name] = {"registers": 0, "shared": 0, "stack": 0, "spill_stores": 0, "spill_loads": 0}
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            found[name].update(stack=int(match[1]), spill_stores=int(match[2]), spill_loads=int(match[3]))
        elif match := re.search(r"Used (\d+) registers", line):
            found[name]["registers"] = int(match[1])
            shared = re.search(r"(\d+) bytes smem", line)
            found[name]["shared"] = int(shared[1]) if shared else 0
    return found


def sources(executable: Any) -> list[str]:
    """The CUDA source of every device module in an executable.

    Parameters
    ----------
    executable : tvm.runtime.Executable or tvm.runtime.Module
        What ``tvm.compile`` returned.
    """
    waiting, found = [getattr(executable, "mod", executable)], []
    while waiting:
        module = waiting.pop()
        if module.kind == "cuda":
            found.append(str(module.inspect_source("cuda") or module.inspect_source("")))
        waiting.extend(module.imports)
    return found


def _string(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def embed(blob: bytes, arch: str, compiler: Compiler = compile_source) -> bytes:
    """Replace the CUDA source in a library's import blob by compiled code.

    Parameters
    ----------
    blob : bytes
        As the runtime reads it: a length, then length-prefixed records.
    arch : str
        ``sm_90`` and the like.
    compiler : callable, optional
        Compiles one source.

    Returns
    -------
    bytes
        The blob with the same modules; those that held no source are untouched.

    Raises
    ------
    CompileError
        A record is not laid out as expected.
    """
    mark = _string(b"cuda")
    result, position = b"", 8
    while (found := blob.find(mark, position)) >= 0:
        start = found + len(mark) + 8
        (length,) = struct.unpack_from("<Q", blob, start - 8)
        record = blob[start : start + length]
        if not record.startswith(mark):
            # The word occurs elsewhere, or the module is compiled already.
            result, position = result + blob[position : found + len(mark)], found + len(mark)
            continue
        source = _source_of(record)
        kind, image = compiler(source.decode(), arch)
        table = record[len(mark) : len(record) - len(_string(source))]
        replaced = _string(kind.encode()) + table + _string(image)
        result += blob[position:found] + mark + _string(replaced)
        position = start + length
        _log.info("compiled %d bytes of CUDA source for %s to %d bytes", len(source), arch, len(image))
    result += blob[position:]
    return struct.pack("<Q", len(result)) + result


def _source_of(record: bytes) -> bytes:
    """The last string of a record: the one whose length is what is left behind it."""
    for place in range(len(record) - 8, -1, -1):
        (length,) = struct.unpack_from("<Q", record, place)
        if length == len(record) - place - 8 and length:
            return record[place + 8 :]
    raise CompileError("this TVM release writes CUDA modules in a form that is not known here; use 0.27")


def pack_imports(arch: str, compiler: Compiler = compile_source) -> Callable[[Any, bool, str, str], str]:
    """What ``export_library`` takes as ``fpack_imports`` to embed compiled CUDA code.

    Parameters
    ----------
    arch : str
        ``sm_90`` and the like; see :func:`architecture`.
    compiler : callable, optional
        Compiles one source.

    Examples
    --------
    >>> executable.export_library("model.so", fpack_imports=pack_imports("sm_90"))  # doctest: +SKIP
    """

    def pack(module: Any, is_system_lib: bool, prefix: str, folder: str) -> str:
        from tvm.runtime import _ffi_api

        text = str(_ffi_api.ModulePackImportsToC(module, is_system_lib, prefix))
        symbol = re.search(r"const unsigned char (\w+)\[(\d+)\] = \{", text)
        if symbol is None or is_system_lib:
            raise CompileError("the library's imports could not be packed; use TVM 0.27")
        body = text[symbol.end() : text.index("}", symbol.end())]
        blob = np.array(
            [int(item, 16) for item in body.replace("\n", "").split(",") if item.strip()], np.uint8
        )
        data, assembly = Path(folder) / "imports.bin", Path(folder) / "imports.S"
        data.write_bytes(embed(blob.tobytes(), arch, compiler))
        # The assembler reads the bytes: a C array of some megabytes takes minutes to compile.
        assembly.write_text(
            f'.section .rodata\n.balign 64\n.globl {symbol[1]}\n{symbol[1]}:\n.incbin "{data}"\n'
            '.section .note.GNU-stack,"",@progbits\n',
            encoding="utf-8",
        )
        return str(assembly)

    return pack
