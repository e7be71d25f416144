"""Move quantize up and dequantize down through operators that only move numbers.

``HoistQuantize`` before and after::

    lv = R.nn.pad(x, (0, 0, 0, 0, 0, 1, 0, 1))        lv = cat.quantize(x, q)
    lv1 = cat.quantize(lv, q)                         lv1 = R.nn.pad(lv, ..., pad_value=q.zero_point)

``SinkDequantize`` before and after::

    lv = cat.dequantize(x, q)                         lv = R.strided_slice(x, ...)
    lv1 = R.strided_slice(lv, ...)                    lv1 = cat.dequantize(lv, q)

Then numbers are moved while they are one byte wide, a quantize meets the kernel whose epilogue can take it, and a
dequantize meets the kernel that reads integers.  Padding with zeros becomes padding with the zero point.
"""

from __future__ import annotations

import numpy as np
from tvm import relax

from tvm_backend import compat, dialect
from tvm_backend.kernels.spec import QParams
from tvm_backend.passes.rewriter import Rewriter, as_pass

__all__ = ["HoistQuantize", "SinkDequantize"]

_MOVES = (
    "reshape", "permute_dims", "squeeze", "expand_dims", "flatten", "strided_slice", "take", "broadcast_to", "flip",
)  # fmt: skip


def _moved(call: relax.Expr, tensor: relax.Expr, q: QParams) -> relax.Expr | None:
    """`call` applied to the integers `tensor` instead of the numbers they stand for; None when that is no mere move."""
    name = compat.op_name(call)
    if name in _MOVES:
        return compat.call_with(call, [tensor, *call.args[1:]])
    if name == "nn.pad" and str(call.attrs.pad_mode) == "constant" and float(call.attrs.pad_value) == 0.0:
        if not q.qmin <= q.zero_point <= q.qmax:  # zero itself is not among the values
            return None
        return relax.op.nn.pad(tensor, compat.ints(call.attrs.pad_width), "constant", float(q.zero_point))
    return None


class _Hoist(Rewriter):
    def visit(self, expr: relax.Expr) -> relax.Expr | None:
        found = dialect.match_quantize(expr)
        if found is None:
            return None
        x, q = found
        move = self.definition(x)
        if not isinstance(move, relax.Call) or not move.args or _moved(move, move.args[0], q) is None:
            return None
        source, moves = move.args[0], [move]
        while isinstance(inner := self.definition(source), relax.Call) and inner.args:
            if _moved(inner, inner.args[0], q) is None:
                break
            moves.append(inner)
            source = inner.args[0]
        value = self.emit(dialect.quantize(source, q))
        for step in reversed(moves):
            value = self.emit(_moved(step, value, q))
        return value


class _Sink(Rewriter):
    def visit(self, expr: relax.Expr) -> relax.Expr | None:
        if not isinstance(expr, relax.Call) or not expr.args:
            return None
        per_channel = dialect.match(self.definition(expr.args[0]), "dequantize_per_channel")
        if per_channel is not None and compat.op_name(expr) == "permute_dims":
            return self._transpose_weight(expr, per_channel)
        found = dialect.match_dequantize(self.definition(expr.args[0]))
        if found is None:
            return None
        x, q = found
        moved = _moved(expr, x, q)
        return None if moved is None else dialect.dequantize(self.emit(moved), q)

    def _transpose_weight(self, expr: relax.Expr, call: dialect.SymbolicCall) -> relax.Expr | None:
        weight, scales, zero_points = call.args
        if not compat.is_constant(weight):
            return None
        value = compat.constant_value(weight)
        axes = compat.ints(expr.attrs.axes) if expr.attrs.axes else list(range(value.ndim))[::-1]
        axis = axes.index(call.attributes["axis"] % value.ndim)
        attributes = {**call.attributes, "axis": axis}
        return dialect.dequantize_per_channel(
            compat.constant(np.transpose(value, axes)), scales, zero_points, attributes
        )


HoistQuantize = as_pass(_Hoist, "HoistQuantize")
SinkDequantize = as_pass(_Sink, "SinkDequantize")
