"""Concatenate integers along the channels.

Before::

    lv = cat.dequantize(a, qa)
    lv1 = cat.dequantize(b, qb)
    lv2 = R.concat((lv, lv1), axis=-1)

After::

    lv2 = cat.kernel(a, b, ConcatSpec(...))
"""

from __future__ import annotations

from tvm import relax

from tvm_backend import compat, dialect
from tvm_backend.kernels.spec import ConcatSpec, Epilogue
from tvm_backend.passes.rewriter import Rewriter, as_pass

__all__ = ["FoldConcat"]


class _Fold(Rewriter):
    def visit(self, expr: relax.Expr) -> relax.Expr | None:
        if compat.op_name(expr) != "concat" or not isinstance(expr.args[0], relax.Tuple):
            return None
        fields = list(expr.args[0].fields)
        sources = [dialect.match_dequantize(self.definition(field)) for field in fields]
        shapes = [dialect.shape_of(field) for field in fields]
        rank = len(shapes[0])
        if any(source is None for source in sources) or expr.attrs.axis is None or rank < 2:
            return None
        if int(expr.attrs.axis) % rank != rank - 1:
            return None
        if not all(isinstance(size, int) for shape in shapes for size in shape[1:]):
            return None
        operands, inputs = zip(*[source for source in sources if source is not None], strict=True)
        spec = ConcatSpec(
            batch=dialect.static_batch(fields[0]),
            shape=tuple(shapes[0][1:-1]),
            channels=tuple(shape[-1] for shape in shapes),
            inputs=tuple(inputs),
            epilogue=Epilogue(),
        )
        return dialect.kernel(spec, list(operands), shapes[0][0])


FoldConcat = as_pass(_Fold, "FoldConcat")
