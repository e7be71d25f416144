"""Evaluate changes of shape and type of constants, so that later passes see weights and biases as plain constants.

Before::

    lv = R.reshape(bias, R.shape([1, 16, 1, 1]))
    lv1 = R.add(conv, lv)

After::

    lv1 = R.add(conv, bias_reshaped)

Weights that are quantized in the graph are quantized here.  Only operators that move or convert numbers are evaluated; TVM's own constant folding compiles each one, which takes
seconds where numpy takes none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from tvm_backend import compat, dialect
from tvm_backend.passes.rewriter import Rewriter, as_pass

__all__ = ["FoldConstants"]


def _quantized(
    value: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, attributes: dict[str, Any]
) -> np.ndarray:
    """As torch computes it, in float32."""
    steps = np.round(value.astype(np.float32) * (np.float32(1.0) / scale.astype(np.float32)))
    shifted = steps + zero_point.astype(np.float32)
    return np.clip(shifted, attributes["qmin"], attributes["qmax"]).astype(attributes["dtype"])


class _Fold(Rewriter):
    def visit(self, expr: relax.Expr) -> relax.Expr | None:
        call = dialect.match(expr, "quantize", "quantize_per_channel")
        if call is not None and all(compat.is_constant(arg) for arg in call.args):
            return compat.constant(self._quantize(call))
        name = compat.op_name(expr)
        if name not in ("reshape", "permute_dims", "expand_dims", "squeeze", "astype", "broadcast_to"):
            return None
        if not compat.is_constant(expr.args[0]):
            return None
        value = compat.constant_value(expr.args[0])
        if name == "permute_dims":
            axes = compat.ints(expr.attrs.axes) if expr.attrs.axes else None
            return compat.constant(np.transpose(value, axes), str(value.dtype))
        if name == "astype":
            return compat.constant(value.astype(str(expr.attrs.dtype)), str(expr.attrs.dtype))
        shape = dialect.shape_of(self.emit(expr))
        if not all(isinstance(d, int) for d in shape):
            return None
        shaped = np.broadcast_to(value, shape) if name == "broadcast_to" else value.reshape(shape)
        return compat.constant(shaped, str(value.dtype))

    def _quantize(self, call: dialect.SymbolicCall) -> np.ndarray:
        value, *parameters = [compat.constant_value(arg) for arg in call.args]
        if call.name == "quantize":
            q = call.attributes
            inverse = np.asarray(1.0 / q.inverse)
            attributes = {"qmin": q.qmin, "qmax": q.qmax, "dtype": q.dtype}
            return _quantized(value, inverse, np.asarray(q.zero_point), attributes)
        shape = [1] * value.ndim
        shape[call.attributes["axis"]] = -1
        scale, zero_point = (parameter.reshape(shape) for parameter in parameters)
        return _quantized(value, scale, zero_point, call.attributes)


FoldConstants = as_pass(_Fold, "FoldConstants")
