"""Make a shared library of what TVM compiled; the one step that needs a tool from outside."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from cat_plugin.errors import CompileError

__all__ = ["export", "find"]

_COMPILERS = ("c++", "g++", "clang++", "cc", "gcc", "clang")


def find() -> list[str]:
    """The command that links.

    Returns
    -------
    list of str
        ``$CXX`` when it is set, else the first compiler on the path, else the compiler of the ``ziglang`` package.

    Raises
    ------
    CompileError
        There is none.
    """
    chosen = os.environ.get("CXX", "").split()
    if chosen and shutil.which(chosen[0]):
        return chosen
    for name in _COMPILERS:
        if (found := shutil.which(name)) is not None:
            return [found]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "c++"]
    raise CompileError(
        "no C++ compiler was found to link the library with; install one (Debian: apt-get install g++), "
        "or: pip install ziglang"
    )


def _link(output: str, objects: list[str], *_ignored: Any, **__ignored: Any) -> None:
    command = [*find(), "-shared", "-fPIC", "-o", output, *objects]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(f"linking failed: {' '.join(command)}\n{done.stderr.strip()}")


_link.output_format = "so"  # type: ignore[attr-defined]
_link.object_format = "o"  # type: ignore[attr-defined]


def export(executable: Any, path: Path, pack_imports: Any = None) -> None:
    """Write a compiled executable as a shared library.

    Parameters
    ----------
    executable : tvm.runtime.Executable
        What ``tvm.compile`` returned.
    path : pathlib.Path
        The library to write.
    pack_imports : callable, optional
        For CUDA targets, from :func:`tvm_backend.cuda_build.pack_imports`: compiles the device code.
    """
    options = {} if pack_imports is None else {"fpack_imports": pack_imports}
    executable.export_library(str(path), fcompile=_link, **options)
