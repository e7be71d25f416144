"""Make one kernel of what computes a token's own grid and rounds to it, for a processor.

Before::

    lv = R.min(x, axis=[-1], keepdims=True)              # and so on, as the engine writes it
    ...
    lv8 = cat.quantize_per_token(x, scale, zero)
    lv9 = cat.dequantize_per_token(lv8, scale, zero)

After::

    lv = cat.kernel(x, TokensSpec(...))
    lv1 = lv[0]                                          # integers
    lv2 = lv[1]                                          # scale and zero point of each
    lv9 = cat.dequantize_rows(lv1, lv2)

Linear layers take the integers (:mod:`tvm_backend.passes.fold_grouped_linear`).  Grids that come from elsewhere are left alone.
"""

from __future__ import annotations

import math

import numpy as np
from tvm import relax

from tvm_backend import compat, dialect
from tvm_backend.kernels.spec import LEAST_SCALE, TokensSpec
from tvm_backend.passes.rewriter import Rewriter, as_pass

__all__ = ["FoldTokens"]


class _Fold(Rewriter):
    def visit(self, expr: relax.Expr) -> relax.Expr | None:
        back = dialect.match(expr, "dequantize_per_token")
        made = None if back is None else dialect.match(self.definition(back.args[0]), "quantize_per_token")
        if back is None or made is None:
            return None
        x, scale, zero = made.args
        if not (scale.same_as(back.args[1]) and zero.same_as(back.args[2])):
            return None
        if made.attributes["qmin"] != 0 or made.attributes["dtype"] != "uint8":
            return None
        *leading, features = dialect.shape_of(x)
        share = self._share(x, scale, zero, made.attributes["qmax"])
        if share is None or not leading or not isinstance(features, int):
            return None
        rows = math.prod(leading[1:], start=leading[0])
        if len(leading) > 1:
            x = self.emit(relax.op.reshape(x, [rows, features]))
        spec = TokensSpec(dialect.static_batch(x), features, made.attributes["qmax"], share)
        both = self.emit(dialect.kernel(spec, [x], dialect.shape_of(x)[0]))
        integers, grid = (self.emit(relax.TupleGetItem(both, i)) for i in range(2))
        value = dialect.dequantize_rows(integers, grid)
        return relax.op.reshape(self.emit(value), [*leading, features]) if len(leading) > 1 else value

    def _share(self, x: relax.Expr, scale: relax.Expr, zero: relax.Expr, qmax: int) -> float | None:
        """The share of their range that tokens keep, where scale and zero point come from it; see :class:`TokensSpec`."""
        width = self._clipped(scale, LEAST_SCALE, None)
        steps, difference = self._times(width)
        ends = self._made(difference, "subtract")
        if steps is None or np.float32(steps) != np.float32(1 / qmax) or ends is None:
            return None
        whole = self._made(self._made_of(zero, "astype"), "round")
        ratio = None if whole is None else self._made(whole[0], "divide")
        if ratio is None or not ratio[1].same_as(scale):
            return None
        negative = self._made(ratio[0], "negative")
        if negative is None or not negative[0].same_as(ends[1]):
            return None
        high, low = self._end(ends[0], "max", x), self._end(ends[1], "min", x)
        return high if high is not None and high == low else None

    def _end(self, expr: relax.Expr, extreme: str, x: relax.Expr) -> float | None:
        """The share of one end of the range, 0 included."""
        share, clipped = self._times(expr)
        bounds = (0.0, None) if extreme == "max" else (None, 0.0)
        reduced = self.definition(self._clipped(clipped, *bounds))
        if share is None or compat.op_name(reduced) != extreme or not reduced.args[0].same_as(x):
            return None
        last = len(dialect.shape_of(x)) - 1
        axes = None if reduced.attrs.axis is None else compat.ints(reduced.attrs.axis)
        return share if reduced.attrs.keepdims and axes in ([-1], [last]) else None

    def _made(self, expr: relax.Expr | None, name: str) -> list[relax.Expr] | None:
        """The operands of the operator `name` that computes `expr`; None for another."""
        if expr is None or compat.op_name(made := self.definition(expr)) != name:
            return None
        return list(made.args)

    def _made_of(self, expr: relax.Expr, name: str) -> relax.Expr | None:
        operands = self._made(expr, name)
        return None if operands is None else operands[0]

    def _times(self, expr: relax.Expr | None) -> tuple[float | None, relax.Expr | None]:
        """The number that `expr` is multiplied by, and the rest."""
        for number, value in _pairs(self._made(expr, "multiply")):
            if compat.is_constant(number) and compat.constant_value(number).size == 1:
                return float(compat.constant_value(number).item()), value
        return None, None

    def _clipped(self, expr: relax.Expr | None, low: float | None, high: float | None) -> relax.Expr | None:
        """What is clipped to these bounds; None is infinite."""
        operands = self._made(expr, "clip")
        if operands is None:
            return None
        wanted = (-np.inf if low is None else low, np.inf if high is None else high)
        return operands[0] if tuple(map(compat.number, operands[1:])) == wanted else None


def _pairs(operands: list[relax.Expr] | None) -> list[tuple[relax.Expr, relax.Expr]]:
    return [] if operands is None else [(operands[0], operands[1]), (operands[1], operands[0])]


FoldTokens = as_pass(_Fold, "FoldTokens")
