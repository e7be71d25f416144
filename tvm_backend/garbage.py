"""Python's search for cyclic garbage, put off: importing and tracing make millions of objects that live on."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["seldom_collected"]

_OBJECTS = 200_000
"""After so many new objects; Python's own 700 take a quarter of the time in which TVM and PyTorch are imported."""


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Look for cyclic garbage after 200000 new objects only, where it is looked for at all."""
    before = gc.get_threshold()
    if before[0]:
        gc.set_threshold(max(before[0], _OBJECTS), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
