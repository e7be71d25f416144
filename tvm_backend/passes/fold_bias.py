"""Add a constant bias inside the kernel in front of it.

Before::

    lv = cat.kernel(x, w, scale, zeros, ConvSpec(...))
    lv1 = R.permute_dims(lv, [0, 3, 1, 2])
    lv2 = R.add(lv1, bias)                            # bias of shape (1, C, 1, 1)

After::

    lv = cat.kernel(x, w, scale, bias, ConvSpec(...))
    lv1 = R.permute_dims(lv, [0, 3, 1, 2])
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from tvm_backend import compat, dialect
from tvm_backend.kernels.spec import ConvSpec, Epilogue, LinearSpec
from tvm_backend.passes.rewriter import Rewriter, as_pass

__all__ = ["FoldBias"]

_BETWEEN = ("permute_dims", "squeeze", "reshape")


class _Fold(Rewriter):
    def visit(self, expr: relax.Expr) -> relax.Expr | None:
        if compat.op_name(expr) != "add":
            return None
        for value, bias in (expr.args, expr.args[::-1]):
            if compat.is_constant(bias):
                return self._merge(value, compat.constant_value(bias))
        return None

    def _merge(self, value: relax.Expr, bias: np.ndarray) -> relax.Expr | None:
        if not self.sole_user(value):
            return None
        between: list[Any] = []
        producer = self.definition(value)
        while compat.op_name(producer) in _BETWEEN:
            between.append(producer)
            producer = self.definition(producer.args[0])
        call = dialect.match_kernel(producer, ConvSpec, LinearSpec)
        if call is None or call.attributes.epilogue != Epilogue():
            return None
        shape = dialect.shape_of(value)
        channels = len(compat.constant_value(call.args[3]))
        if isinstance(call.attributes, ConvSpec):
            wanted = [1] * len(shape)
            wanted[1] = channels
        else:
            wanted = [channels]
        if bias.size != channels or list(bias.shape)[-len(wanted) :] not in (wanted, wanted[-bias.ndim :]):
            return None
        data, weight, scale, old, *further = call.args
        total = compat.constant_value(old) + bias.reshape(-1).astype(np.float32)
        batch = dialect.shape_of(data)[0]
        args = [data, weight, scale, compat.constant(total), *further]
        out = self.emit(dialect.kernel(call.attributes, args, batch))
        for step in reversed(between):
            out = self.emit(compat.call_with(step, [out, *step.args[1:]]))
        return out


FoldBias = as_pass(_Fold, "FoldBias")
