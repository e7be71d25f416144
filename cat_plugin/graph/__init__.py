"""What is handed over: the ops, the module that calls them, the exported graph and the bundle on disk."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cat_plugin.graph.module import ClusterAffineModule

__all__ = ["ClusterAffineModule"]

# Bundles are read without torch, so nothing that needs torch is imported before it is asked for.
_LAZY = {"ClusterAffineModule": "cat_plugin.graph.module"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
