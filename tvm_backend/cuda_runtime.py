"""TVM's CUDA part, found and loaded where a library runs on a GPU."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
from pathlib import Path
from typing import Any

from cat_plugin.errors import LibraryError

__all__ = ["ALONE", "load_cuda_runtime"]

ALONE = threading.RLock()
"""Held during a call on a CUDA device: while one thread captures a graph, what another starts on the device is an error."""


def load_cuda_runtime(tvm: Any) -> None:
    """TVM's CUDA part, which its runtime-only mode leaves out; it needs the driver and the CUDA runtime."""
    try:
        # The system's own, or one that LD_LIBRARY_PATH names, goes before what pip has installed.
        ctypes.CDLL("libcudart.so.13", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        candidates = [str(Path(entry) / "cu13" / "lib" / "libcudart.so.13") for entry in _nvidia_packages()]
        for candidate in filter(os.path.exists, candidates):
            ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
    try:
        ctypes.CDLL(str(Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"))
    except OSError as error:
        raise LibraryError(
            f"the library runs on a CUDA device, whose runtime cannot be loaded here ({error}); it needs NVIDIA's driver "
            "and the CUDA 13 runtime (pip install nvidia-cuda-runtime). Compile with target='native' for the processor"
        ) from error


def _nvidia_packages() -> list[str]:
    """Where pip puts NVIDIA's libraries."""
    found = importlib.util.find_spec("nvidia")
    return list(found.submodule_search_locations or ()) if found is not None else []
