"""Quantize and dequantize next to operators left in float, as operators that fuse with these.

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
from tvm_backend.kernels.cpu.functions import SHIFT, SHIFT_BITS
from tvm_backend.kernels.spec import DequantizeSpec, QParams, QuantizeSpec
from tvm_backend.passes.legalize_float import held
from tvm_backend.passes.rewriter import Rewriter, as_pass

__all__ = ["UnfoldBorder"]

_FUSED = frozenset(
    [
        "abs", "add", "clip", "concat", "divide", "exp", "maximum", "minimum", "multiply", "negative", "nn.conv2d_transpose",
        "nn.leakyrelu", "nn.relu", "nn.relu6", "nn.silu", "power", "rsqrt", "sigmoid", "sqrt", "subtract", "tanh", "where",
    ]
)  # fmt: skip


def _integer(value: int) -> Any:
    return tirx.const(value, "int32")


def _constant(value: Any) -> Any:
    return tirx.const(float(np.float32(value)), "float32")


def _quantized(q: QParams) -> Any:
    """As :func:`tvm_backend.kernels.cpu.border.quantize_reference` says, integer 0 for NaN.

    Rounded by adding a number behind which float32 has no digits, NaN told by its bits: TVM takes vectors apart at the functions that
    round and that ask for NaN.
    """
    low, high = q.qmin - q.zero_point, q.qmax - q.zero_point

    def rounded(value: Any) -> Any:
        clipped = tirx.min(tirx.max(value * _constant(q.inverse), _constant(low)), _constant(high))
        shifted = tirx.reinterpret("int32", clipped + _constant(SHIFT)) - _integer(SHIFT_BITS - q.zero_point)
        unsigned = tirx.bitwise_and(tirx.reinterpret("int32", value), _integer(0x7FFFFFFF))
        nothing = _integer(min(max(0, q.qmin), q.qmax))
        return tirx.Cast(q.dtype, tirx.Select(unsigned > _integer(0x7F800000), nothing, shifted))

    def compute(x: Any) -> Any:
        return te.compute(x.shape, lambda *at: held("value", x(*at), rounded), name="quantize")

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
