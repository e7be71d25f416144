"""CAT for Intel Neural Compressor: cluster-based affine correction of low-bit quantized models.

Importing this package registers the ``cat`` algorithm with whichever Neural Compressor is installed,
at the moment that Neural Compressor itself is imported; neither it, torch nor TVM is imported here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cat_plugin._lazy import attach
from cat_plugin.hosts import register as _register
from cat_plugin.hosts import unregister
from cat_plugin.version import __version__

if TYPE_CHECKING:
    from cat_plugin.correction import correct
    from cat_plugin.graph.bundle import export_bundle
    from cat_plugin.hosts.inc3.algorithm import CATConfig
    from cat_plugin.recipe.recipe import Recipe, load_recipe
    from cat_plugin.serialization.saving import load, save

__all__ = [
    "CATConfig",
    "Recipe",
    "__version__",
    "correct",
    "export_bundle",
    "load",
    "load_recipe",
    "save",
    "unregister",
]

_LAZY = {
    "CATConfig": "cat_plugin.hosts.inc3.algorithm",
    "Recipe": "cat_plugin.recipe.recipe",
    "correct": "cat_plugin.correction",
    "export_bundle": "cat_plugin.graph.bundle",
    "load": "cat_plugin.serialization.saving",
    "load_recipe": "cat_plugin.recipe.recipe",
    "save": "cat_plugin.serialization.saving",
}

__getattr__, __dir__ = attach(__name__, _LAZY)


_register()
