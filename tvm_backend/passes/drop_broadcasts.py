"""Take out what repeats a tensor to the shape that it has; torch's products of matrices come with such.

Before::

    lv = R.broadcast_to(x, R.shape([n, 6, 257, 64]))     # x: (n, 6, 257, 64)
    lv1 = R.matmul(lv, y)

After::

    lv1 = R.matmul(x, y)
"""

from __future__ import annotations

from tvm import relax

from tvm_backend import compat
from tvm_backend.passes.rewriter import Rewriter, as_pass

__all__ = ["DropBroadcasts"]


class _Drop(Rewriter):
    def visit(self, expr: relax.Expr) -> relax.Expr | None:
        if compat.op_name(expr) != "broadcast_to" or not compat.same_shape(expr.args[0], self.current):
            return None
        return expr.args[0]


DropBroadcasts = as_pass(_Drop, "DropBroadcasts")
