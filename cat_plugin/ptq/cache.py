"""Where cached activations live: in memory while they fit the budget, in mapped files beyond it."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from pathlib import Path

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
    in_memory : int
        Bytes now held in memory.
    peak : int
        Most bytes held in memory at a time.
    on_disk : int
        Bytes written to mapped files so far.

    Notes
    -----
    Use as a context manager: the files live in a temporary directory that is removed at the end.
    """

    def __init__(self, budget: int | None = None) -> None:
        self.budget = budget
        self.in_memory = self.peak = self.on_disk = 0
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._files: dict[int, tuple[Path, mmap.mmap]] = {}
        self._sizes: dict[int, int] = {}

    def __enter__(self) -> TensorStore:
        return self

    def __exit__(self, *_: object) -> None:
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised tensor of ``shape``; on the CPU and mapped to a file if the budget is used up."""
        size = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
        if self.budget is not None and self.in_memory + size > self.budget and size > 0:
            if self._directory is None:
                self._directory = tempfile.TemporaryDirectory(prefix="cat_plugin_")
            path = Path(self._directory.name) / f"{len(self._files)}_{self.on_disk}.bin"
            with write_errors(QuantizationError, f"activations to {path}"), path.open("wb") as stream:
                # All of it at once: a page that finds no space later would end the process with a bus error.
                os.posix_fallocate(stream.fileno(), 0, size)
            with path.open("r+b") as stream:
                mapped = mmap.mmap(stream.fileno(), size)
            tensor = torch.frombuffer(mapped, dtype=dtype).reshape(shape)
            self._files[id(tensor)] = (path, mapped)
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
        path, _ = self._files.pop(id(tensor), (None, None))
        if path is not None:
            path.unlink(missing_ok=True)  # the mapping stays valid until the tensor goes

    def settle(self) -> None:
        """Let the pages of mapped files go from the process's memory; what is in them stays in the files."""
        for _, mapped in self._files.values():
            mapped.madvise(mmap.MADV_DONTNEED)
