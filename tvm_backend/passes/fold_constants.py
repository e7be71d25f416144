"""Evaluate changes of shape and type of constants, so that later passes see weights and biases as plain constants.

Before::

    lv = R.reshape(bias, R.shape([1, 16, 1, 1]))
    lv1 = R.add(conv, lv)

After::

    lv1 = R.add(conv, bias_reshaped)

Only operators that move or convert numbers are evaluated; TVM's own constant folding compiles each one, which takes
seconds where numpy takes none.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tvm_backend import compat, dialect
from tvm_backend.passes.rewriter import Rewriter, as_pass

__all__ = ["FoldConstants"]


class _Fold(Rewriter):
    def visit(self, expr: Any) -> Any | None:
        name = compat.op_name(expr)
        if name not in ("reshape", "permute_dims", "expand_dims", "squeeze", "astype", "broadcast_to"):
            return None
        if not compat.is_constant(expr.args[0]):
            return None
        value = compat.constant_value(expr.args[0])
        if name == "permute_dims":
            return compat.constant(
                np.transpose(value, compat.ints(expr.attrs.axes) if expr.attrs.axes else None)
            )
        if name == "astype":
            return compat.constant(value.astype(str(expr.attrs.dtype)))
        shape = dialect.shape_of(self.emit(expr))
        if not all(isinstance(d, int) for d in shape):
            return None
        return compat.constant(
            np.broadcast_to(value, shape) if name == "broadcast_to" else value.reshape(shape)
        )


FoldConstants = as_pass(_Fold, "FoldConstants")
