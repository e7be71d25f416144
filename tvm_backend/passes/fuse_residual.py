"""Add a shortcut inside the epilogue of the kernel that computes the other summand.

Before::

    lv = cat.kernel(x, w, scale, bias, ConvSpec(...))          # float32
    lv1 = cat.dequantize(y, q)
    lv2 = R.add(lv, lv1)

After::

    lv2 = cat.kernel(x, w, scale, bias, y, ConvSpec(..., residual=q))

A float32 shortcut is added as it is.  Where the kernel's value is quantized before the addition, as graphs do that
quantize both summands, that becomes part of the epilogue too::

    lv1 = cat.quantize(lv, p)                                  # lv from above
    lv2 = cat.dequantize(lv1, p)
    lv3 = R.add(lv2, lv4)                                      # becomes ConvSpec(..., residual=q, branch=p)
"""

from __future__ import annotations

from tvm import relax

from tvm_backend import compat, dialect
from tvm_backend.kernels.spec import Epilogue, QParams, WeightedSpec
from tvm_backend.passes.rewriter import Rewriter, as_pass

__all__ = ["FuseResidual"]


class _Fuse(Rewriter):
    def visit(self, expr: relax.Expr) -> relax.Expr | None:
        if compat.op_name(expr) != "add" or any(not isinstance(arg, relax.Var) for arg in expr.args):
            return None
        if not compat.same_shape(*expr.args):
            return None
        for value, other in (expr.args[::-1], expr.args):
            found = self._summand(value)
            if found is None:
                continue
            call, branch = found
            shortcut = dialect.match_dequantize(self.definition(other))
            residual = shortcut[1] if shortcut is not None else "float32"
            operand = shortcut[0] if shortcut is not None else other
            if shortcut is None and not self._float32(other):
                continue
            spec = dialect.with_epilogue(call.attributes, residual=residual, branch=branch)
            return dialect.kernel(spec, [*call.args, operand], dialect.shape_of(value)[0])
        return None

    def _summand(self, value: relax.Expr) -> tuple[dialect.SymbolicCall, QParams | None] | None:
        """The kernel that computes `value` for this addition alone, and what quantizes its result."""
        if not self.sole_user(value):
            return None
        branch: QParams | None = None
        back = dialect.match_dequantize(self.definition(value))
        if back is not None:
            stored, branch = back
            source = dialect.match_quantize(self.definition(stored))
            if source is None or source[1] != branch or not self.sole_user(stored):
                return None
            value = source[0]
            if not self.sole_user(value):
                return None
        call = dialect.match_kernel(self.definition(value), WeightedSpec)
        return None if call is None or call.attributes.epilogue != Epilogue() else (call, branch)

    def _float32(self, expr: relax.Expr) -> bool:
        return str(compat.type_of(expr).dtype) == "float32"


FuseResidual = as_pass(_Fuse, "FuseResidual")
