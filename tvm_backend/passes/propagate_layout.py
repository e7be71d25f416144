"""Move transpositions down until they cancel, so that numbers stay channels-last between kernels.

Before::

    lv = R.permute_dims(x, [0, 3, 1, 2])
    lv1 = R.nn.relu(lv)
    lv2 = R.permute_dims(lv1, [0, 2, 3, 1])

After::

    lv1 = R.nn.relu(x)

An operator that works on each number alone passes a transposition on; one that names axes gets them renamed; two
transpositions in a row become one or none; a transposition that only moves axes of length one disappears into the
reshape below it.  What is left over stands at the model's borders or around operators that insist on their layout.
"""

from __future__ import annotations

import numpy as np
from tvm import relax

from tvm_backend import compat, dialect
from tvm_backend.passes.rewriter import Rewriter, as_pass

__all__ = ["PropagateLayout"]

_UNARY = frozenset(
    [
        "nn.relu",
        "nn.relu6",
        "nn.silu",
        "nn.gelu",
        "nn.leakyrelu",
        "clip",
        "sigmoid",
        "tanh",
        "exp",
        "sqrt",
        "rsqrt",
        "abs",
        "negative",
        "round",
        "floor",
        "astype",
    ]
)
_BINARY = frozenset(["add", "subtract", "multiply", "divide", "maximum", "minimum", "power"])


class _Propagate(Rewriter):
    def _axes(self, expr: relax.Expr) -> list[int] | None:
        """The axes of the transposition that `expr` is bound to."""
        call = self.definition(expr)
        if compat.op_name(call) != "permute_dims":
            return None
        rank = len(dialect.shape_of(call.args[0]))
        return compat.ints(call.attrs.axes) if call.attrs.axes is not None else list(range(rank))[::-1]

    def _source(self, expr: relax.Expr) -> relax.Expr:
        return self.definition(expr).args[0]

    def visit(self, expr: relax.Expr) -> relax.Expr | None:
        if not isinstance(expr, relax.Call) or not expr.args:
            return None
        name = compat.op_name(expr)
        if name in _BINARY:
            return self._binary(expr)
        if name == "concat":
            return self._concat(expr)
        if name == "expand_dims" and compat.op_name(inner := self.definition(expr.args[0])) == "squeeze":
            same = inner.attrs.axis is not None and compat.ints(inner.attrs.axis) == compat.ints(
                expr.attrs.axis
            )
            return inner.args[0] if same else None
        call = dialect.match(expr, "quantize", "dequantize")
        operand = call.args[0] if call is not None else expr.args[0]
        axes = self._axes(operand)
        if axes is None:
            alone = call is not None or name in _UNARY
            return self._below_squeeze(expr, call, operand) if alone else None
        source = self._source(operand)
        if call is not None:
            make = dialect.quantize if call.name == "quantize" else dialect.dequantize
            return self._permuted(make(source, call.attributes), axes)
        if name in _UNARY:
            return self._permuted(compat.call_with(expr, [source, *expr.args[1:]]), axes)
        if name == "permute_dims":
            return self._compose(expr, source, axes)
        if name == "reshape":
            return self._reshape(expr, source, axes)
        if name == "strided_slice":
            return self._slice(expr, source, axes)
        if name == "nn.pad":
            widths = compat.ints(expr.attrs.pad_width)
            moved = [0] * len(widths)
            for i, axis in enumerate(axes):
                moved[2 * axis : 2 * axis + 2] = widths[2 * i : 2 * i + 2]
            pad = relax.op.nn.pad(source, moved, str(expr.attrs.pad_mode), float(expr.attrs.pad_value))
            return self._permuted(pad, axes)
        return None

    def _below_squeeze(
        self, expr: relax.Expr, call: dialect.SymbolicCall | None, operand: relax.Expr
    ) -> relax.Expr | None:
        """Drop the axis of length one, which one-dimensional convolutions get, behind an operator instead of before."""
        squeeze = self.definition(operand)
        if compat.op_name(squeeze) != "squeeze" or squeeze.attrs.axis is None:
            return None
        (source,) = squeeze.args
        if call is None:
            moved = compat.call_with(expr, [source, *expr.args[1:]])
        else:
            make = dialect.quantize if call.name == "quantize" else dialect.dequantize
            moved = make(source, call.attributes)
        return relax.op.squeeze(self.emit(moved), compat.ints(squeeze.attrs.axis))

    def _permuted(self, expr: relax.Expr, axes: list[int]) -> relax.Expr:
        further = self.visit(expr)
        return relax.op.permute_dims(self.emit(expr if further is None else further), axes)

    def _compose(self, expr: relax.Expr, source: relax.Expr, first: list[int]) -> relax.Expr:
        rank = len(first)
        second = compat.ints(expr.attrs.axes) if expr.attrs.axes is not None else list(range(rank))[::-1]
        axes = [first[axis] for axis in second]
        return source if axes == list(range(rank)) else relax.op.permute_dims(source, axes)

    def _binary(self, expr: relax.Expr) -> relax.Expr | None:
        found = [self._axes(arg) for arg in expr.args]
        axes = found[0] or found[1]
        if axes is None:
            return None
        operands = []
        for arg, own in zip(expr.args, found, strict=True):
            if own is not None and own == axes and len(dialect.shape_of(arg)) == len(axes):
                operands.append(self._source(arg))
            elif compat.is_constant(arg):
                value = compat.constant_value(arg)
                if value.ndim > len(axes):
                    return None
                value = value.reshape((1,) * (len(axes) - value.ndim) + value.shape)
                turned = np.transpose(value, np.argsort(axes))
                operands.append(compat.constant(turned, str(value.dtype)))
            else:
                return None
        return self._permuted(compat.call_with(expr, operands), axes)

    def _concat(self, expr: relax.Expr) -> relax.Expr | None:
        fields = expr.args[0].fields if isinstance(expr.args[0], relax.Tuple) else None
        if fields is None:
            return None
        found = [self._axes(field) for field in fields]
        if found[0] is None or any(axes != found[0] for axes in found) or expr.attrs.axis is None:
            return None
        axis = found[0][int(expr.attrs.axis) % len(found[0])]
        return self._permuted(relax.op.concat([self._source(field) for field in fields], axis), found[0])

    def _reshape(self, expr: relax.Expr, source: relax.Expr, axes: list[int]) -> relax.Expr | None:
        shape = dialect.shape_of(source)
        kept = [axis for axis in axes if shape[axis] != 1]
        return relax.op.reshape(source, expr.args[1]) if kept == sorted(kept) else None

    def _slice(self, expr: relax.Expr, source: relax.Expr, axes: list[int]) -> relax.Expr | None:
        named = [axes[int(axis.value) % len(axes)] for axis in expr.args[1].fields]
        bounds = [[int(item.value) for item in arg.fields] for arg in expr.args[2:]]
        steps = bounds[2] if len(bounds) > 2 else None
        inbound = bool(expr.attrs.assume_inbound)
        cut = relax.op.strided_slice(source, named, bounds[0], bounds[1], steps, assume_inbound=inbound)
        return self._permuted(cut, axes)


PropagateLayout = as_pass(_Propagate, "PropagateLayout")
