"""Large batches in pieces, so that memory is taken for some hundred rows at a time, and given back."""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["give_back", "rows_at_once", "splits"]

_MOST_ROWS = 256
_MOST_BYTES = 32 * 2**20


def splits(manifest: dict[str, Any]) -> bool:
    """Whether a model works on rows: the first axis, and no other, of all inputs and outputs is the batch.

    What compiled it has run a row alone and among others (``independent_rows``).
    """
    if not manifest.get("independent_rows", False):
        return False
    tensors = [*manifest["inputs"], *manifest["outputs"]]
    named = {entry["shape"][0] if entry["shape"] else 0 for entry in tensors}
    return (
        len(named) == 1
        and isinstance(next(iter(named)), str)
        and all(isinstance(size, int) for entry in tensors for size in entry["shape"][1:])
    )


def rows_at_once(inputs: Sequence[dict[str, Any]]) -> int:
    """How many rows a call takes at once: 256, or as many as have 32 MiB of inputs."""
    row: int = sum(math.prod(entry["shape"][1:]) * np.dtype(entry["dtype"]).itemsize for entry in inputs)
    return max(1, min(_MOST_ROWS, _MOST_BYTES // max(1, row)))


def give_back(tvm: Any) -> None:
    """Return what TVM keeps for later calls to the operating system."""
    tvm.get_global_func("vm.builtin.memory_manager.clear")()
    with contextlib.suppress(OSError, AttributeError):  # only glibc keeps what is freed, and has this
        ctypes.CDLL(None).malloc_trim(0)
