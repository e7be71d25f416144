"""Make kernels of softmax, LayerNorm, RMSNorm and GELU.

Before::

    lv = R.nn.softmax(x, axis=-1)                        # (n, 6, 257, 257)

After::

    lv = R.reshape(x, R.shape([n * 6 * 257, 257]))
    lv1 = cat.kernel(lv, RowsSpec("softmax", ...))
    lv2 = R.reshape(lv1, R.shape([n, 6, 257, 257]))

GELU whose result is multiplied by a constant, or to which one is added, is left to the loops that do that.

RMSNorm is found as it is spelled out, ``x * rsqrt(mean(x * x) + epsilon)``, or with a division by the root; a multiplication of the
result by a constant for each feature is the kernel's scale.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm import relax

from tvm_backend import compat, dialect
from tvm_backend.kernels.spec import Epilogue, RowsSpec
from tvm_backend.passes.rewriter import Rewriter, as_pass

__all__ = ["FoldRows"]

_EACH: dict[str, Any] = {"nn.gelu": "gelu", "nn.gelu_tanh": "gelu_tanh"}


class _Fold(Rewriter):
    def visit(self, expr: relax.Expr) -> relax.Expr | None:
        name = compat.op_name(expr)
        if name == "nn.softmax":
            return self._rows(expr.args, "softmax", [int(expr.attrs.axis)])
        if name == "nn.layer_norm" and expr.attrs.center and expr.attrs.scale:
            axes = compat.ints(expr.attrs.axes)
            return self._rows(expr.args, "layer_norm", axes, epsilon=float(expr.attrs.epsilon))
        if name in ("multiply", "divide"):
            scaled = self._scaled(expr)
            return self._rms_norm(expr) if scaled is None else scaled
        if name not in _EACH or self._goes_on():
            return None
        return self._rows(expr.args, _EACH[name], [-1])

    def _goes_on(self) -> bool:
        """Whether a constant is multiplied or added next: loops of what is left in float take all of it in one pass."""
        users = self.upcoming_users()
        user = users[0] if len(users) == 1 else None
        if user is None or compat.op_name(user) not in ("add", "multiply"):
            return False
        return any(map(compat.is_constant, user.args))

    def _rows(
        self, args: list[relax.Expr], function: Any, axes: list[int], epsilon: float = 0.0
    ) -> relax.Expr | None:
        x, *constants = args
        *leading, features = dialect.shape_of(x)
        floats = all(str(compat.type_of(arg).dtype) == "float32" for arg in args)
        if not floats or not leading or not isinstance(features, int) or axes not in ([-1], [len(leading)]):
            return None
        rows = math.prod(leading[1:], start=leading[0])
        if len(leading) > 1:
            x = self.emit(relax.op.reshape(x, [rows, features]))
        spec = RowsSpec(dialect.static_batch(x), features, function, Epilogue(), epsilon)
        out = dialect.kernel(spec, [x, *constants], dialect.shape_of(x)[0])
        return relax.op.reshape(self.emit(out), [*leading, features]) if len(leading) > 1 else out

    def _rms_norm(self, expr: relax.Expr) -> relax.Expr | None:
        """``x`` times one over the root of the mean of its squares, without a scale so far."""
        division = compat.op_name(expr) == "divide"
        for x, factor in (expr.args,) if division else (expr.args, expr.args[::-1]):
            root = self.definition(factor)
            if compat.op_name(root) != ("sqrt" if division else "rsqrt"):
                continue
            mean, epsilon = self._sum(root.args[0])
            if (
                compat.op_name(mean) != "mean"
                or not mean.attrs.keepdims
                or not self._is_square(mean.args[0], x)
            ):
                continue
            ones = compat.constant(np.ones(dialect.shape_of(x)[-1], np.float32))
            return self._rows([x, ones], "rms_norm", compat.ints(mean.attrs.axis), epsilon)
        return None

    def _sum(self, expr: relax.Expr) -> tuple[relax.Expr, float]:
        """What a positive number is added to, and the number."""
        total = self.definition(expr)
        if compat.op_name(total) == "add":
            for value, number in (total.args, total.args[::-1]):
                if compat.is_constant(number) and compat.constant_value(number).size == 1:
                    epsilon = float(compat.constant_value(number).item())
                    return (self.definition(value), epsilon) if epsilon >= 0 else (total, 0.0)
        return total, 0.0

    def _is_square(self, expr: relax.Expr, x: relax.Expr) -> bool:
        made = self.definition(expr)
        name = compat.op_name(made)
        if name == "power":
            power = made.args[1]
            two = compat.is_constant(power) and (compat.constant_value(power) == 2).all()
            return bool(two) and made.args[0].same_as(x)
        return (name == "multiply" and all(arg.same_as(x) for arg in made.args)) or (
            name == "square" and made.args[0].same_as(x)
        )

    def _scaled(self, expr: relax.Expr) -> relax.Expr | None:
        """A scale for each feature that is multiplied on behind an RMSNorm."""
        if compat.op_name(expr) != "multiply":
            return None
        for value, scale in (expr.args, expr.args[::-1]):
            if not compat.is_constant(scale) or not self.sole_user(value):
                continue
            rows = self.definition(value)
            source = rows.args[0] if compat.op_name(rows) == "reshape" else value
            call = dialect.match_kernel(self.definition(source), RowsSpec)
            factors = compat.constant_value(scale)
            if (
                call is None
                or call.attributes.function != "rms_norm"
                or factors.shape != (call.attributes.features,)
            ):
                continue
            whole = compat.constant(dialect.float_array(call.args[1]) * factors)
            out = dialect.kernel(call.attributes, [call.args[0], whole], dialect.shape_of(source)[0])
            return out if source is value else relax.op.reshape(self.emit(out), dialect.shape_of(value))
        return None


FoldRows = as_pass(_Fold, "FoldRows")
