"""Make a linear layer on integer weights of a product whose weights have scales for groups, or whose rows have grids of their own.

Before::

    lv = cat.dequantize_rows(x, grid)                    # or cat.dequantize(x, q), with groups
    lv1 = cat.dequantize_per_channel(w, scales, zero_points, axis=0)   # (out * groups, in / groups)
    lv2 = R.reshape(lv1, R.shape([out, in]))
    lv3 = R.permute_dims(lv2, axes=[1, 0])
    lv4 = R.matmul(lv, lv3)

After::

    lv4 = cat.kernel(x, w, scales, zeros, grid, GroupedLinearSpec(...))

Where the activations are not quantized they stay float32, and only the weights are integers.  For a processor, as :mod:`tvm_backend.passes.fold_linear` does it with one scale a channel and whole tensors.
"""

from __future__ import annotations

import math

import numpy as np
from tvm import relax

from tvm_backend import compat, dialect
from tvm_backend.kernels.spec import Epilogue, GroupedLinearSpec, QParams, TokensSpec
from tvm_backend.passes.rewriter import Rewriter, as_pass
from tvm_backend.passes.weights import QuantizedWeight, read_weight

__all__ = ["FoldGroupedLinear"]


_NONE = QParams(1.0, 0, -128, 127, "int8")
"""Stands for the grid of what has none."""


class _Fold(Rewriter):
    def visit(self, expr: relax.Expr) -> relax.Expr | None:
        if compat.op_name(expr) != "matmul":
            return None
        weight = self._weight(expr.args[1])
        if weight is None:
            return None
        values, groups = weight.values, len(weight.scales)
        rows = self._rows(expr.args[0])
        tensor = self._tensor(expr.args[0]) if rows is None and groups > 1 else None
        if rows is not None:
            x, grid = rows
            q, factor, further = self._grid_of(x), np.float64(1), [grid]
        elif tensor is not None:
            x, q = tensor
            factor, further = np.float64(q.scale), []
        elif str(compat.type_of(expr.args[0]).dtype) == "float32":
            x, q, factor, further = self._merged(expr.args[0]), _NONE, np.float64(1), []
        else:
            return None
        *leading, features = dialect.shape_of(expr.args[0])
        if q is None or not leading or features != values.shape[1]:
            return None
        spec = GroupedLinearSpec(
            batch=dialect.static_batch(x),
            in_features=values.shape[1],
            out_features=values.shape[0],
            input=q,
            epilogue=Epilogue(),
            weight_bits=weight.bits,
            groups=groups,
            tokens=rows is not None,
            real=q is _NONE,
        )
        scale = (weight.scales * factor).astype(np.float32)
        constants = [compat.constant(a) for a in (values, scale, np.zeros(len(values), np.float32))]
        out = dialect.kernel(spec, [x, *constants, *further], dialect.shape_of(x)[0])
        return out if len(leading) == 1 else relax.op.reshape(self.emit(out), [*leading, len(values)])

    def _weight(self, expr: relax.Expr) -> QuantizedWeight | None:
        """A weight (out, in) and its scales (groups, out)."""
        whole = read_weight(self.definition(expr), axis=-1)
        if whole is not None and whole.values.ndim == 2:
            return QuantizedWeight(np.ascontiguousarray(whole.values.T), whole.scales[None], whole.bits)
        transposed = self.definition(expr)
        if compat.op_name(transposed) != "permute_dims" or len(dialect.shape_of(expr)) != 2:
            return None
        grouped = self.definition(transposed.args[0])
        if compat.op_name(grouped) != "reshape":
            return None
        shape = dialect.shape_of(transposed.args[0])
        parts = read_weight(self.definition(grouped.args[0]), axis=0)
        if parts is None or parts.values.ndim != 2 or shape[1] % parts.values.shape[1]:
            return None
        scales = parts.scales.reshape(shape[0], -1).T
        return QuantizedWeight(parts.values.reshape(shape), np.ascontiguousarray(scales), parts.bits)

    def _unshaped(self, expr: relax.Expr) -> relax.Expr:
        """The rows before their leading axes were merged or split."""
        features = dialect.shape_of(expr)[-1]
        while compat.op_name(made := self.definition(expr)) == "reshape":
            if dialect.shape_of(made.args[0])[-1] != features:
                break
            expr = made.args[0]
        return expr

    def _rows(self, expr: relax.Expr) -> tuple[relax.Expr, relax.Expr] | None:
        """Integers (N, C) and their grids."""
        call = dialect.match(self.definition(self._unshaped(expr)), "dequantize_rows")
        return None if call is None else (call.args[0], call.args[1])

    def _grid_of(self, integers: relax.Expr) -> QParams | None:
        """What is known of the integers of tokens."""
        item = self.definition(integers)
        made = self.definition(item.tuple_value) if isinstance(item, relax.TupleGetItem) else item
        call = dialect.match_kernel(made, TokensSpec)
        kind = None if call is None else call.attributes.out_kinds[0]
        return kind if isinstance(kind, QParams) else None

    def _tensor(self, expr: relax.Expr) -> tuple[relax.Expr, QParams] | None:
        """Integers (N, C) on one grid."""
        data = dialect.match_dequantize(self.definition(expr))
        if data is None:
            return None
        return self._merged(data[0]), data[1]

    def _merged(self, x: relax.Expr) -> relax.Expr:
        """As rows (N, C)."""
        *leading, features = dialect.shape_of(x)
        if len(leading) < 2:
            return x
        rows = math.prod(leading[1:], start=leading[0])
        return self.emit(relax.op.reshape(x, [rows, features]))


FoldGroupedLinear = as_pass(_Fold, "FoldGroupedLinear")
