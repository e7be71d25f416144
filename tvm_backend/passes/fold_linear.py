"""Make an integer linear layer of ``matmul(dequantize(x), dequantize(w))``.

Before::

    lv = cat.dequantize(x, q)
    lv1 = cat.dequantize_per_channel(w, scales, zero_points, axis=1)   # (in, out)
    lv2 = R.matmul(lv, lv1)

After::

    lv2 = cat.kernel(x, w_transposed, scales * q.scale, zeros, LinearSpec(...))

Leading axes beyond the first (tokens of a transformer) are rows like any others: they are merged and split again.
"""

from __future__ import annotations

import math

import numpy as np
from tvm import relax

from tvm_backend import compat, dialect
from tvm_backend.kernels.spec import Epilogue, LinearSpec
from tvm_backend.passes.rewriter import Rewriter, as_pass
from tvm_backend.passes.weights import read_weight

__all__ = ["FoldLinear"]


class _Fold(Rewriter):
    def visit(self, expr: relax.Expr) -> relax.Expr | None:
        if compat.op_name(expr) != "matmul":
            return None
        data = dialect.match_dequantize(self.definition(expr.args[0]))
        weight = read_weight(self.definition(expr.args[1]), axis=-1)
        if data is None or weight is None or weight.values.ndim != 2:
            return None
        x, q = data
        *leading, features = dialect.shape_of(x)
        if not leading or not isinstance(features, int):
            return None
        if len(leading) > 1:
            rows = math.prod(leading[1:], start=leading[0])
            x = self.emit(relax.op.reshape(x, [rows, features]))
        values = np.ascontiguousarray(weight.values.T)
        spec = LinearSpec(
            batch=dialect.static_batch(x),
            in_features=features,
            out_features=values.shape[0],
            input=q,
            epilogue=Epilogue(),
            weight_bits=weight.bits,
        )
        scale = (weight.scales * q.scale).astype(np.float32)
        constants = [compat.constant(a) for a in (values, scale, np.zeros_like(scale))]
        out = self.emit(dialect.kernel(spec, [x, *constants], dialect.shape_of(x)[0]))
        return relax.op.reshape(out, [*leading, values.shape[0]]) if len(leading) > 1 else out


FoldLinear = as_pass(_Fold, "FoldLinear")
