"""Quantize inside the kernels of rows, rotations and products: what they compute is stored as integers at once.

Before::

    lv = cat.kernel(x, RowsSpec("softmax", ...))              # (n * 6 * 257, 257), float32
    lv1 = R.reshape(lv, R.shape([n, 6, 257, 257]))
    lv2 = cat.kernel(lv1, QuantizeSpec(..., outputs=(q,)))

After::

    lv = cat.kernel(x, RowsSpec("softmax", ..., outputs=(q,)))
    lv2 = R.reshape(lv, R.shape([n, 6, 257, 257]))
"""

from __future__ import annotations

from tvm import relax

from tvm_backend import compat, dialect
from tvm_backend.kernels.spec import ProductSpec, QuantizeSpec, RotationSpec, RowsSpec
from tvm_backend.passes.rewriter import Rewriter, as_pass

__all__ = ["FuseQuantize"]


class _Fuse(Rewriter):
    def visit(self, expr: relax.Expr) -> relax.Expr | None:
        call = dialect.match_kernel(expr, QuantizeSpec)
        if call is None or call.attributes.to_channels_last:
            return None
        (value,) = call.args
        while self.sole_user(value) and compat.op_name(made := self.definition(value)) == "reshape":
            value = made.args[0]
        source = dialect.match_kernel(self.definition(value), RowsSpec, RotationSpec, ProductSpec)
        if source is None or not self.sole_user(value) or source.attributes.epilogue.outputs != ("float32",):
            return None
        if isinstance(source.attributes, ProductSpec) and not source.attributes.integers:
            return None  # may be no number, which a quantize kernel makes 0 of
        spec = dialect.with_epilogue(source.attributes, outputs=call.attributes.outputs)
        shape = dialect.shape_of(value)
        if len(spec.out_kinds) > 1:
            return None
        out = dialect.kernel(spec, source.args, shape[0])
        wanted = dialect.shape_of(self.current)
        return out if len(shape) == len(wanted) else relax.op.reshape(self.emit(out), wanted)


FuseQuantize = as_pass(_Fuse, "FuseQuantize")
