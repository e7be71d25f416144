"""The safetensors file of a bundle: equal numbers give equal bytes, and shapes can be read before the numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import IO, Any

import numpy as np

__all__ = ["array_bytes", "array_shapes"]

_HEADER_LIMIT = 2**20
_ALIGNMENT = 8


def array_bytes(arrays: Mapping[str, np.ndarray[Any, Any]], metadata: Mapping[str, str]) -> bytes:
    """Arrays as a safetensors file whose bytes depend on nothing but the arguments.

    safetensors keeps metadata in a hash map and writes it in an order that changes from process to process, which would
    give files of the same model different digests.

    Parameters
    ----------
    arrays : mapping of str to numpy.ndarray
        Any shapes and dtypes that safetensors knows.
    metadata : mapping of str to str
        Written to the file's header.

    Returns
    -------
    bytes
    """
    from safetensors.numpy import save

    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    data: bytes = save(contiguous, metadata=dict(metadata))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    return len(header).to_bytes(8, "little") + header + data[end:]


def array_shapes(stream: IO[bytes]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the shape of each array and the metadata, from the header of a safetensors file; None when it has none.

    Parameters
    ----------
    stream : binary file
        At its beginning; left after the header.

    Returns
    -------
    shapes : dict of str to list of int
    metadata : dict of str to str
    """
    size = int.from_bytes(stream.read(8), "little")
    if size > _HEADER_LIMIT:
        return None
    try:
        header = json.loads(stream.read(size))
        metadata = dict(header.pop("__metadata__", {}))
        return {name: entry["shape"] for name, entry in header.items()}, metadata
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError):
        return None
