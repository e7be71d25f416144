"""Make a shared library of what TVM compiled; the one step that needs a tool from outside."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cat_plugin.errors import CompileError

__all__ = ["export", "find", "reserve"]

_COMPILERS = ("c++", "g++", "clang++", "cc", "gcc", "clang")
_CODE = 32 * 2**20
"""Bytes that the code of a library may take while it is made."""


def find(machine: str = "") -> list[str]:
    """The command that links.

    Parameters
    ----------
    machine : str, optional
        The machine that the library is for, as ``platform.machine()`` names it; this one by default.

    Returns
    -------
    list of str
        ``$CXX`` when it is set, else the first compiler on the path, else the compiler of the ``ziglang`` package.  For
        another machine, its cross compiler under Debian's name, or ``ziglang``.

    Raises
    ------
    CompileError
        There is none.
    """
    foreign = machine not in ("", platform.machine())
    chosen = os.environ.get("CXX", "").split()
    if chosen and shutil.which(chosen[0]) and (not foreign or machine in chosen[0]):
        return chosen
    for name in (f"{machine}-linux-gnu-g++", f"{machine}-linux-gnu-gcc") if foreign else _COMPILERS:
        if (found := shutil.which(name)) is not None:
            return [found]
    if importlib.util.find_spec("ziglang") is not None:
        return [
            sys.executable,
            "-m",
            "ziglang",
            "c++",
            *(["-target", f"{machine}-linux-gnu"] if foreign else []),
        ]
    if foreign:
        package = f"g++-{machine.replace('_', '-')}-linux-gnu"
        raise CompileError(
            f"no compiler was found to link a library for {machine} with; install one (Debian: apt-get install {package}), "
            "or: pip install ziglang"
        )
    raise CompileError(
        "no C++ compiler was found to link the library with; install one (Debian: apt-get install g++), "
        "or: pip install ziglang"
    )


class _Linker:
    """What TVM calls to link objects."""

    output_format = "so"
    object_format = "o"

    def __init__(self, machine: str) -> None:
        self.command = [*find(machine), "-shared", "-fPIC"]

    def __call__(self, output: str, objects: list[str], *_ignored: Any, **__ignored: Any) -> None:
        command = [*self.command, "-o", output, *objects]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CompileError(f"linking failed: {' '.join(command)}\n{done.stderr.strip()}")


def reserve(directory: Path, size: int) -> None:
    """Fail here where there is no space for `size` bytes and the code: LLVM ends the whole process when it cannot write an object."""
    with tempfile.TemporaryFile(dir=directory) as stream:
        os.posix_fallocate(stream.fileno(), 0, size + _CODE)


def export(
    executable: Any,
    path: Path,
    pack_imports: Any = None,
    machine: str = "",
    constants: int = 0,
    addons: Sequence[str] = (),
) -> None:
    """Write a compiled executable as a shared library.

    Parameters
    ----------
    executable : tvm.runtime.Executable
        What ``tvm.compile`` returned.
    path : pathlib.Path
        The library to write.
    pack_imports : callable, optional
        For CUDA targets, from :func:`tvm_backend.cuda_build.pack_imports`: compiles the device code.
    machine : str, optional
        The machine that the library is for; this one by default.
    constants : int, optional
        Bytes of constants in it.
    addons : sequence of str, optional
        Objects to link besides.

    Raises
    ------
    CompileError
        There is no linker, or it failed.
    OSError
        There is no space beside `path`, where the objects are put.
    """
    options = {} if pack_imports is None else {"fpack_imports": pack_imports}
    with tempfile.TemporaryDirectory(dir=path.parent) as workspace:
        # Objects and the library hold the constants once each.
        reserve(Path(workspace), 2 * constants)
        executable.export_library(
            str(path), fcompile=_Linker(machine), addons=list(addons), workspace_dir=workspace, **options
        )
