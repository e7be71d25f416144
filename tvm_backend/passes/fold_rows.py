"""Make kernels of softmax, LayerNorm and GELU, for a processor.

Before::

    lv = R.nn.softmax(x, axis=-1)                        # (n, 6, 257, 257)

After::

    lv = R.reshape(x, R.shape([n * 6 * 257, 257]))
    lv1 = cat.kernel(lv, RowsSpec("softmax", ...))
    lv2 = R.reshape(lv1, R.shape([n, 6, 257, 257]))
"""

from __future__ import annotations

from typing import Any

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
            return self._rows(expr, "softmax", [int(expr.attrs.axis)])
        if name == "nn.layer_norm" and expr.attrs.center and expr.attrs.scale:
            axes = compat.ints(expr.attrs.axes)
            return self._rows(expr, "layer_norm", axes, epsilon=float(expr.attrs.epsilon))
        return self._rows(expr, _EACH[name], [-1]) if name in _EACH else None

    def _rows(
        self, expr: relax.Expr, function: Any, axes: list[int], epsilon: float = 0.0
    ) -> relax.Expr | None:
        x, *constants = expr.args
        *leading, features = dialect.shape_of(x)
        floats = all(str(compat.type_of(arg).dtype) == "float32" for arg in expr.args)
        if not floats or not leading or not isinstance(features, int) or axes not in ([-1], [len(leading)]):
            return None
        rows = leading[0]
        for size in leading[1:]:
            rows = rows * size
        if len(leading) > 1:
            x = self.emit(relax.op.reshape(x, [rows, features]))
        spec = RowsSpec(dialect.static_batch(x), features, function, Epilogue(), epsilon)
        out = dialect.kernel(spec, [x, *constants], dialect.shape_of(x)[0])
        return relax.op.reshape(self.emit(out), [*leading, features]) if len(leading) > 1 else out


FoldRows = as_pass(_Fold, "FoldRows")
