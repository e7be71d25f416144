"""Where cached activations live: in memory while they fit the budget, in mapped files beyond it."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
import tempfile
from typing import Any

import torch
from torch import Tensor

from cat_plugin.errors import QuantizationError
from cat_plugin.files import write_errors

__all__ = ["TensorStore"]


class TensorStore:
    """Allocates tensors within a memory budget.

    Parameters
    ----------
    budget : int or None
        Bytes of tensors held in memory at a time; None has no limit.

    Attributes
    ----------
    reserved : int
        Bytes of the budget that are left to what is computed with them (:meth:`reserve`).
    in_memory : int
        Bytes now held in memory.
    peak : int
        Most bytes held in memory at a time.
    on_disk : int
        Bytes written to mapped files so far.

    Notes
    -----
    The files are in the directory of temporary files and have no name there: they go with the tensors, or the process.
    """

    def __init__(self, budget: int | None = None) -> None:
        self.budget = budget
        self.in_memory = self.peak = self.on_disk = self.reserved = 0
        self._files: dict[int, tuple[Tensor, mmap.mmap]] = {}  # held, so that a number is that of one tensor
        self._sizes: dict[int, int] = {}

    def __enter__(self) -> TensorStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised tensor of ``shape``; on the CPU and mapped to a file if the budget is used up."""
        size = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
        if self.budget is not None and self.in_memory + size > self.budget - self.reserved and size > 0:
            with (
                write_errors(QuantizationError, f"activations to {tempfile.gettempdir()}"),
                tempfile.TemporaryFile(prefix="cat_plugin_") as stream,
            ):
                # All of it at once: a page that finds no space later would end the process with a bus error.
                os.posix_fallocate(stream.fileno(), 0, size)
                mapped = mmap.mmap(stream.fileno(), size)
            tensor = torch.frombuffer(mapped, dtype=dtype).reshape(shape)
            self._files[id(tensor)] = (tensor, mapped)
            self.on_disk += size
            return tensor
        tensor = torch.empty(shape, dtype=dtype, device=device)
        self._sizes[id(tensor)] = size
        self.in_memory += size
        self.peak = max(self.peak, self.in_memory)
        return tensor

    def release(self, tensor: Tensor) -> None:
        """Say that ``tensor`` is no longer needed."""
        self.in_memory -= self._sizes.pop(id(tensor), 0)
        self._files.pop(id(tensor), None)

    def reserve(self, size: int) -> None:
        """Leave so much of the budget, at most all of it, to what is not allocated here; what is held stays."""
        self.reserved = min(size, self.budget or 0)

    def settle(self) -> None:
        """Let the pages of mapped files go from the process's memory; what is in them stays in the files."""
        for _, mapped in self._files.values():
            mapped.madvise(mmap.MADV_DONTNEED)

    def trim(self) -> None:
        """Within a budget, give memory that was freed back to the system, where the C library keeps it otherwise."""
        trim = _malloc_trim() if self.budget is not None else None
        if trim is not None:
            trim(0)


@functools.cache
def _malloc_trim() -> Any:
    """glibc's; None elsewhere."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
