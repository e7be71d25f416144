"""Two reshapes behind each other are one, or none: what leads rows of one kernel into the next is then no copy.

Before::

    lv = R.reshape(x, R.shape([n, 128, 1536]))     # x: (n * 128, 1536)
    lv1 = R.reshape(lv, R.shape([n * 128, 1536]))
    lv2 = cat.kernel(lv1, RowsSpec("gelu", ...))

After::

    lv2 = cat.kernel(x, RowsSpec("gelu", ...))
"""

from __future__ import annotations

from tvm import relax

from tvm_backend import compat
from tvm_backend.passes.rewriter import Rewriter, as_pass

__all__ = ["JoinReshapes"]


class _Join(Rewriter):
    def visit(self, expr: relax.Expr) -> relax.Expr | None:
        if compat.op_name(expr) != "reshape":
            return None
        before = self.definition(expr.args[0])
        source = before.args[0] if compat.op_name(before) == "reshape" else expr.args[0]
        if compat.same_shape(source, self.current):
            return source
        return None if source is expr.args[0] else relax.op.reshape(source, expr.args[1])


JoinReshapes = as_pass(_Join, "JoinReshapes")
