"""Quantize and dequantize next to operators left in float, for a processor, as operators that fuse with these.

Before::

    lv1 = R.multiply(lv, R.sigmoid(lv))
    lv2 = cat.kernel(lv1, QuantizeSpec(...))

After, ``lv2`` is computed in the loops that compute ``lv1``, which is never stored.  What moves channels stays a kernel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax, te, tirx

from tvm_backend import compat, dialect
from tvm_backend.kernels.spec import DequantizeSpec, QParams, QuantizeSpec
from tvm_backend.passes.rewriter import Rewriter, as_pass

__all__ = ["UnfoldBorder"]

_FUSED = frozenset(
    [
        "abs", "add", "clip", "concat", "divide", "exp", "maximum", "minimum", "multiply", "negative", "nn.conv2d_transpose",
        "nn.leakyrelu", "nn.relu", "nn.relu6", "nn.silu", "power", "rsqrt", "sigmoid", "sqrt", "subtract", "tanh", "where",
    ]
)  # fmt: skip


def _constant(value: Any) -> Any:
    return tirx.const(float(np.float32(value)), "float32")


def _quantized(q: QParams) -> Any:
    """As :func:`tvm_backend.kernels.cpu.border.quantize_reference` says, integer 0 for NaN."""

    def compute(x: Any) -> Any:
        def one(*at: Any) -> Any:
            value = x(*at)
            scaled = tirx.nearbyint(value * _constant(q.inverse))
            shifted = tirx.max(scaled, _constant(q.qmin - q.zero_point))
            shifted = tirx.min(shifted, _constant(q.qmax - q.zero_point)) + _constant(q.zero_point)
            nothing = _constant(min(max(0, q.qmin), q.qmax))
            return tirx.Cast(q.dtype, tirx.Select(tirx.isnan(value), nothing, shifted))

        return te.compute(x.shape, one, name="quantize")

    return compute


def _dequantized(q: QParams) -> Any:
    def compute(x: Any) -> Any:
        def one(*at: Any) -> Any:
            shifted = tirx.Cast("int32", x(*at)) - tirx.const(q.zero_point, "int32")
            return tirx.Cast("float32", shifted) * _constant(q.step)

        return te.compute(x.shape, one, name="dequantize")

    return compute


class _Unfold(Rewriter):
    def visit(self, expr: relax.Expr) -> relax.Expr | None:
        call = dialect.match_kernel(expr, QuantizeSpec, DequantizeSpec)
        if call is None:
            return None
        (x,), spec = call.args, call.attributes
        if isinstance(spec, QuantizeSpec):
            if len(spec.outputs) > 1 or spec.to_channels_last:
                return None
            if compat.op_name(self.definition(x)) not in _FUSED:
                return None
            return self.call_loops(_quantized(spec.outputs[0]), x, "quantize")
        users = self.upcoming_users()
        if spec.to_channels_first or any(compat.op_name(user) not in _FUSED for user in users):
            return None
        return self.call_loops(_dequantized(spec.input), x, "dequantize")


UnfoldBorder = as_pass(_Unfold, "UnfoldBorder")
