"""Python's search for cyclic garbage, put off: importing and tracing make millions of objects that live on."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["long_lived", "seldom_collected"]

_OBJECTS = 1_000_000
"""After so many new objects; Python's own 700 take a quarter of the time in which TVM and PyTorch are imported."""

_lock = threading.Lock()
_before: list[
    tuple[int, int, int]
] = []  # the process has one threshold: what the first to come in found, for each inside


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Look for cyclic garbage after a million new objects only, where it is looked for at all.

    Several threads may be inside; the last to leave puts the threshold back.
    """
    with _lock:
        _before.append(_before[0] if _before else gc.get_threshold())
        first, *others = _before[0]
        if first:
            gc.set_threshold(max(first, _OBJECTS), *others)
    try:
        yield
    finally:
        with _lock:
            found = _before.pop()
            if not _before:
                gc.set_threshold(*found)


def long_lived() -> None:
    """Take the objects that there are for those that live on: the next search is for what is made from now on."""
    if not gc.get_freeze_count():  # what a program froze stays so
        gc.freeze()
        gc.unfreeze()  # to the oldest generation
