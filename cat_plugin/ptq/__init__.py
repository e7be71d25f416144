"""The low-bit post-training quantization engine.

``quantize(model, QuantSpec(w_bits=2, a_bits=4), batches)`` returns a module with explicit quantize and dequantize
operations, and a report.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cat_plugin._lazy import attach

if TYPE_CHECKING:
    from cat_plugin.ptq.adaptation import adapt
    from cat_plugin.ptq.engine import quantize
    from cat_plugin.ptq.equivalent_model import transform
    from cat_plugin.ptq.report import LayerReport, QuantReport
    from cat_plugin.ptq.sensitivity_analysis import Sensitivity, sensitivity
    from cat_plugin.ptq.spec import QuantSpec
    from cat_plugin.ptq.synthetic import synthetic_inputs

__all__ = [
    "LayerReport",
    "QuantReport",
    "QuantSpec",
    "Sensitivity",
    "adapt",
    "quantize",
    "sensitivity",
    "synthetic_inputs",
    "transform",
]

_LAZY = {
    "LayerReport": "cat_plugin.ptq.report",
    "QuantReport": "cat_plugin.ptq.report",
    "QuantSpec": "cat_plugin.ptq.spec",
    "Sensitivity": "cat_plugin.ptq.sensitivity_analysis",
    "adapt": "cat_plugin.ptq.adaptation",
    "quantize": "cat_plugin.ptq.engine",
    "sensitivity": "cat_plugin.ptq.sensitivity_analysis",
    "synthetic_inputs": "cat_plugin.ptq.synthetic",
    "transform": "cat_plugin.ptq.equivalent_model",
}

__getattr__, __dir__ = attach(__name__, _LAZY)
