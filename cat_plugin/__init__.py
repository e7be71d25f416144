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
    from cat_plugin.graph.onnx.correction import append_step, correct_logits, correct_onnx
    from cat_plugin.graph.onnx.reading import load_onnx
    from cat_plugin.graph.onnx.writing import export_onnx
    from cat_plugin.hosts.inc3 import CATConfig
    from cat_plugin.language import perplexity
    from cat_plugin.recipe.recipe import Recipe, load_recipe
    from cat_plugin.serialization.saving import load, save
    from cat_plugin.tokens import correct_tokens

__all__ = [
    "CATConfig",
    "Recipe",
    "__version__",
    "append_step",
    "correct",
    "correct_logits",
    "correct_onnx",
    "correct_tokens",
    "export_bundle",
    "export_onnx",
    "load",
    "load_onnx",
    "load_recipe",
    "perplexity",
    "save",
    "unregister",
]

_LAZY = {
    "CATConfig": "cat_plugin.hosts.inc3",
    "Recipe": "cat_plugin.recipe.recipe",
    "append_step": "cat_plugin.graph.onnx.correction",
    "correct": "cat_plugin.correction",
    "correct_logits": "cat_plugin.graph.onnx.correction",
    "correct_onnx": "cat_plugin.graph.onnx.correction",
    "correct_tokens": "cat_plugin.tokens",
    "export_bundle": "cat_plugin.graph.bundle",
    "export_onnx": "cat_plugin.graph.onnx.writing",
    "load": "cat_plugin.serialization.saving",
    "load_onnx": "cat_plugin.graph.onnx.reading",
    "load_recipe": "cat_plugin.recipe.recipe",
    "perplexity": "cat_plugin.language",
    "save": "cat_plugin.serialization.saving",
}

__getattr__, __dir__ = attach(__name__, _LAZY, ("cluster_affine", "ptq"))


_register()
