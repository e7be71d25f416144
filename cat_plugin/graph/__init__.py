"""What is handed over: the ops, the module that calls them, the exported graph and the bundle on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cat_plugin._lazy import attach

if TYPE_CHECKING:
    from cat_plugin.graph.module import ClusterAffineModule

__all__ = ["ClusterAffineModule"]

# Bundles are read without torch, so nothing that needs torch is imported before it is asked for.
_LAZY = {"ClusterAffineModule": "cat_plugin.graph.module"}

__getattr__, __dir__ = attach(__name__, _LAZY)
