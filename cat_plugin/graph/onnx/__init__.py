"""ONNX both ways: files read as torch modules, quantized graphs written as QDQ, foreign quantized files corrected.

Nothing here imports onnx or onnxruntime before it is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cat_plugin._lazy import attach

if TYPE_CHECKING:
    from cat_plugin.graph.onnx.correction import append_step, correct_logits, correct_onnx
    from cat_plugin.graph.onnx.reading import load_onnx
    from cat_plugin.graph.onnx.writing import export_onnx

__all__ = ["append_step", "correct_logits", "correct_onnx", "export_onnx", "load_onnx"]

_LAZY = {
    "append_step": "cat_plugin.graph.onnx.correction",
    "correct_logits": "cat_plugin.graph.onnx.correction",
    "correct_onnx": "cat_plugin.graph.onnx.correction",
    "export_onnx": "cat_plugin.graph.onnx.writing",
    "load_onnx": "cat_plugin.graph.onnx.reading",
}

__getattr__, __dir__ = attach(__name__, _LAZY)
