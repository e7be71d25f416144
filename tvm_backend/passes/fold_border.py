"""Make kernels of the quantize and dequantize operators that are left: at the borders of the integer part.

Before::

    lv = cat.quantize(x, q)                           # NCHW
    lv1 = R.permute_dims(lv, [0, 2, 3, 1])

After::

    lv1 = cat.kernel(x, QuantizeSpec(..., to_channels_last=True))

Likewise a dequantize with a transposition back.  Without a transposition the kernel keeps the layout; where a dimension
other than the first is not known, or a weight is dequantized for a float operator, ordinary operators do it.  Tokens on grids of
their own that float operators read are rounded by one kernel where it is known how the grids come about.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from tvm import relax

from tvm_backend import compat, dialect
from tvm_backend.kernels.spec import DequantizeSpec, QParams, QuantizeSpec, TokensSpec
from tvm_backend.passes.fold_convolution import NCHW_TO_NHWC, NHWC_TO_NCHW
from tvm_backend.passes.rewriter import Rewriter, as_pass

__all__ = ["FoldBorder"]


_LEFT = (
    "quantize", "dequantize", "dequantize_per_channel", "quantize_per_token", "dequantize_per_token", "dequantize_rows",
)  # fmt: skip


class _Fold(Rewriter):
    def visit(self, expr: relax.Expr) -> relax.Expr | None:
        if compat.op_name(expr) == "permute_dims":
            return self._transposed(expr)
        call = dialect.match(expr)
        if call is None or call.name not in _LEFT:
            return None
        if call.name in _LEFT[2:]:
            return getattr(self, f"_{call.name}")(call)
        x, q = call.args[0], call.attributes
        shape = dialect.shape_of(x)
        if len(shape) < 2 or not all(isinstance(size, int) for size in shape[1:]):
            return self._quantize(x, q) if call.name == "quantize" else self._dequantize(x, q)
        batch, rest = dialect.static_batch(x), tuple(shape[1:])
        spec = QuantizeSpec(batch, rest, (q,)) if call.name == "quantize" else DequantizeSpec(batch, rest, q)
        return dialect.kernel(spec, [x], shape[0])

    def _transposed(self, expr: relax.Expr) -> relax.Expr | None:
        call = dialect.match_kernel(self.definition(expr.args[0]), QuantizeSpec, DequantizeSpec)
        if call is None or expr.attrs.axes is None:
            return None
        axes, spec = compat.ints(expr.attrs.axes), call.attributes
        (x,) = call.args
        shape = dialect.shape_of(x)
        if isinstance(spec, QuantizeSpec) and axes == NCHW_TO_NHWC and not spec.to_channels_last:
            spec = QuantizeSpec(spec.batch, spec.shape, spec.outputs, to_channels_last=True)
        elif isinstance(spec, DequantizeSpec) and axes == NHWC_TO_NCHW and not spec.to_channels_first:
            spec = DequantizeSpec(spec.batch, spec.shape, spec.input, to_channels_first=True)
        else:
            return None
        return dialect.kernel(spec, [x], shape[0])

    def _dequantize_per_channel(self, call: dialect.SymbolicCall) -> relax.Expr | None:
        weight, scales, zero_points = call.args
        axis = call.attributes["axis"]
        if compat.is_constant(weight) and compat.is_constant(scales) and compat.is_constant(zero_points):
            value = compat.constant_value(weight).astype(np.float32)
            shape = [1] * value.ndim
            shape[axis] = -1
            scale, zero = (dialect.float_array(item).reshape(shape) for item in (scales, zero_points))
            return compat.constant((value - zero) * scale)
        return relax.op.dequantize(weight, scales, zero_points, axis=axis)

    def _dequantize_rows(self, call: dialect.SymbolicCall) -> relax.Expr:
        tokens = dialect.match_kernel(self.definition(self.definition(call.args[0]).tuple_value), TokensSpec)
        assert tokens is not None
        spec = dataclasses.replace(tokens.attributes, real=True)
        return dialect.kernel(spec, tokens.args, dialect.shape_of(tokens.args[0])[0])

    def _quantize_per_token(self, call: dialect.SymbolicCall) -> relax.Expr:
        """In the order of torch: ``clip(round(x * (1 / scale) + zero_point))``."""
        x, scales, zero_points = call.args
        low, high, dtype = (call.attributes[name] for name in ("qmin", "qmax", "dtype"))
        inverse = self.emit(relax.op.divide(relax.const(np.float32(1)), scales))
        zero = self.emit(relax.op.astype(zero_points, "float32"))
        shifted = self.emit(relax.op.add(self.emit(relax.op.multiply(x, inverse)), zero))
        clipped = self.emit(relax.op.clip(self.emit(relax.op.round(shifted)), low, high))
        return relax.op.astype(clipped, dtype)

    def _dequantize_per_token(self, call: dialect.SymbolicCall) -> relax.Expr:
        x, scales, zero_points = call.args
        wide, zero = (self.emit(relax.op.astype(value, "float32")) for value in (x, zero_points))
        return relax.op.multiply(self.emit(relax.op.subtract(wide, zero)), scales)

    def _quantize(self, x: relax.Expr, q: QParams) -> relax.Expr:
        scaled = self.emit(relax.op.multiply(x, relax.const(np.float32(q.inverse))))
        rounded = self.emit(relax.op.round(scaled))
        shifted = self.emit(relax.op.add(rounded, relax.const(np.float32(q.zero_point))))
        return relax.op.astype(self.emit(relax.op.clip(shifted, q.qmin, q.qmax)), q.dtype)

    def _dequantize(self, x: relax.Expr, q: QParams) -> relax.Expr:
        if compat.is_constant(x):
            return compat.constant((dialect.float_array(x) - np.float32(q.zero_point)) * np.float32(q.scale))
        wide = self.emit(relax.op.astype(x, "float32"))
        centred = self.emit(relax.op.subtract(wide, relax.const(np.float32(q.zero_point))))
        return relax.op.multiply(centred, relax.const(np.float32(q.scale)))


FoldBorder = as_pass(_Fold, "FoldBorder")
