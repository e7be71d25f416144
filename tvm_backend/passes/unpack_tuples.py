"""Take the fields of tuples that are built in the graph directly.

Before (the importer's form of a pooling that could return indices)::

    lv = R.nn.max_pool2d(x, ...)
    lv1 = R.zeros_like(lv)
    lv2 = (lv, lv1)
    lv3 = lv2[0]

After::

    lv = R.nn.max_pool2d(x, ...)

with every use of ``lv3`` one of ``lv``.
"""

from __future__ import annotations

from tvm import relax

from tvm_backend.passes.rewriter import Rewriter, as_pass

__all__ = ["UnpackTuples"]


class _Unpack(Rewriter):
    def visit(self, expr: relax.Expr) -> relax.Expr | None:
        if not isinstance(expr, relax.TupleGetItem):
            return None
        made = self.definition(expr.tuple_value)
        return made.fields[expr.index] if isinstance(made, relax.Tuple) else None


UnpackTuples = as_pass(_Unpack, "UnpackTuples")
