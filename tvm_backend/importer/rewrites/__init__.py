"""ATen operators in terms of those that TVM's converters read rightly, one kind a file.

A rewrite is a function with the operator's signature, as in torch's own decomposition tables; it returns NotImplemented
where the operator may stay as it is.  :func:`table` is torch's core table with ours over it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm_backend.importer.rewrites import (
    arithmetic,
    attention,
    indexing,
    linear,
    normalization,
    padding,
    pooling,
    promotion,
    reductions,
    resize,
)

__all__ = ["table"]

_KINDS = (
    promotion,
    arithmetic,
    indexing,
    padding,
    pooling,
    resize,
    normalization,
    reductions,
    attention,
    linear,
)


def table() -> dict[Any, Callable[..., Any]]:
    """What ``ExportedProgram.run_decompositions`` is given."""
    import torch

    found = dict(torch.export.default_decompositions())
    for kind in _KINDS:
        found.update(kind.rewrites())
    return found
