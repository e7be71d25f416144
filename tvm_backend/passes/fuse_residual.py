"""Add a shortcut inside the epilogue of the kernel that computes the other summand.

Before::

    lv = cat.kernel(x, w, scale, bias, ConvSpec(...))          # float32
    lv1 = cat.dequantize(y, q)
    lv2 = R.add(lv, lv1)

After::

    lv2 = cat.kernel(x, w, scale, bias, y, ConvSpec(..., residual=q))

A float32 shortcut is added as it is.
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from tvm_backend import compat, dialect
from tvm_backend.kernels.spec import ConvSpec, Epilogue, LinearSpec
from tvm_backend.passes.rewriter import Rewriter, as_pass

__all__ = ["FuseResidual"]


class _Fuse(Rewriter):
    def visit(self, expr: Any) -> Any | None:
        if compat.op_name(expr) != "add" or any(not isinstance(arg, relax.Var) for arg in expr.args):
            return None
        if not compat.same_shape(*expr.args):
            return None
        for value, other in (expr.args[::-1], expr.args):
            call = dialect.match_kernel(self.definition(value), ConvSpec, LinearSpec)
            if call is None or call.attributes.epilogue != Epilogue() or not self.sole_user(value):
                continue
            shortcut = dialect.match_dequantize(self.definition(other))
            residual = shortcut[1] if shortcut is not None else "float32"
            operand = shortcut[0] if shortcut is not None else other
            if shortcut is None and not self._float32(other):
                continue
            spec = dialect.with_epilogue(call.attributes, residual=residual)
            return dialect.kernel(spec, [*call.args, operand], dialect.shape_of(value)[0])
        return None

    def _float32(self, expr: Any) -> bool:
        return str(compat.type_of(expr).dtype) == "float32"


FuseResidual = as_pass(_Fuse, "FuseResidual")
