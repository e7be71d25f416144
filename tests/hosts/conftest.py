"""Which hosts are there, and why a test is skipped."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator

import pytest

import cat_plugin
from tests.trained import _task, task

__all__ = ["_task", "task"]


def inc_version() -> tuple[int, int]:
    """Major and minor version of the installed Neural Compressor, (0, 0) without one."""
    for name in ("neural-compressor", "neural_compressor"):
        try:
            major, minor = importlib.metadata.version(name).split(".")[:2]
        except importlib.metadata.PackageNotFoundError:
            continue
        return int(major), int("".join(c for c in minor if c.isdigit()))
    return 0, 0


INC = inc_version()
needs_inc3 = pytest.mark.skipif(INC < (3, 0), reason=f"needs Neural Compressor 3.x, found {INC[0]}.{INC[1]}")
needs_inc2 = pytest.mark.skipif(
    not (2, 0) <= INC < (3, 8), reason=f"needs the 2.x Python API (2.4 to 3.7), found {INC[0]}.{INC[1]}"
)
needs_pt2e = pytest.mark.skipif(
    INC < (3, 9), reason=f"static int8 in Neural Compressor {INC[0]}.{INC[1]} does not work with torch 2.13"
)


@pytest.fixture
def registered() -> Iterator[Callable[[], None]]:
    """For tests that unregister: whatever happens, CAT is registered afterwards."""
    yield cat_plugin.unregister
    cat_plugin.unregister()
    from cat_plugin.hosts import register

    register()
