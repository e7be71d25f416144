"""Quantize inside the kernel that computes a value, once for every use that wants other parameters.

Before::

    lv = cat.kernel(x, w, scale, bias, ConvSpec(...))          # float32
    lv1 = cat.quantize(lv, q2)                                 # 2 bits, for the next convolution
    lv2 = cat.quantize(lv, q8)                                 # 8 bits, for the shortcut

After::

    lv = cat.kernel(x, w, scale, bias, ConvSpec(..., outputs=(q2, q8)))
    lv1 = lv[0]
    lv2 = lv[1]

Where the value is used as float32 too, that is one more output.
"""

from __future__ import annotations

import tvm
from tvm import relax

from tvm_backend import dialect
from tvm_backend.kernels.spec import TensorKind
from tvm_backend.passes.rewriter import Rewriter, as_pass

__all__ = ["FuseOutputs"]


class _Fuse(Rewriter):
    def __init__(self, mod: tvm.IRModule, function: relax.Function, taken: set[str]) -> None:
        super().__init__(mod, function, taken)
        self._outputs: dict[relax.Expr, dict[TensorKind, relax.Expr]] = {}

    def visit(self, expr: relax.Expr) -> relax.Expr | None:
        call = dialect.match_kernel(expr)
        if call is not None:
            return self._extend(expr, call)
        found = dialect.match_quantize(expr)
        return None if found is None else self._outputs.get(found[0], {}).get(found[1])

    def _extend(self, expr: relax.Expr, call: dialect.SymbolicCall) -> relax.Expr | None:
        epilogue = dialect.epilogue_of(call.attributes)
        if epilogue is None or epilogue.outputs != ("float32",):
            return None
        users = self.upcoming_users()
        quantizers = [dialect.match_quantize(user) for user in users if user is not None]
        wanted: list[TensorKind] = list(dict.fromkeys(found[1] for found in quantizers if found is not None))
        if not wanted:
            return None
        if None in users or any(found is None for found in quantizers):
            wanted.append("float32")
        spec = dialect.with_epilogue(call.attributes, outputs=tuple(wanted))
        kernel = self.emit(dialect.kernel(spec, call.args, dialect.shape_of(self.current)[0]))
        if len(wanted) == 1:
            stored = {wanted[0]: kernel}
        else:
            stored = {kind: self.emit(relax.TupleGetItem(kernel, i)) for i, kind in enumerate(wanted)}
        # The float value stands for the old result even when it is not stored: then only quantizers ask for it.
        value = stored.get("float32", kernel)
        self._outputs[value] = stored
        return value


FuseOutputs = as_pass(_Fuse, "FuseOutputs")
