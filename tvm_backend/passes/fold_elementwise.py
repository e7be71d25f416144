"""Add, clip and requantize integers without storing their float values.

``FoldElementwise`` before and after::

    lv = cat.dequantize(a, qa)
    lv1 = cat.dequantize(b, qb)                       lv2 = cat.kernel(a, b, ElementwiseSpec(inputs=(qa, qb)))
    lv2 = R.add(lv, lv1)

A lone dequantize whose value is clipped or quantized anew becomes a kernel with one input; when it is quantized with the
parameters it had, nothing is left to do.
"""

from __future__ import annotations

from tvm import relax

from tvm_backend import compat, dialect
from tvm_backend.kernels.spec import ElementwiseSpec, Epilogue, QParams, TensorKind
from tvm_backend.passes.rewriter import Rewriter, as_pass

__all__ = ["FoldElementwise"]


class _Fold(Rewriter):
    def visit(self, expr: relax.Expr) -> relax.Expr | None:
        again = dialect.match_quantize(expr)
        if again is not None:
            return self._requantize(*again)
        name = compat.op_name(expr)
        if (
            name == "add"
            and all(isinstance(arg, relax.Var) for arg in expr.args)
            and compat.same_shape(*expr.args)
        ):
            return self._kernel(list(expr.args), "float32")
        if name in ("nn.relu", "nn.relu6", "clip"):
            return self._clip(expr)
        return None

    def _requantize(self, value: relax.Expr, q: QParams) -> relax.Expr | None:
        source = dialect.match_dequantize(self.definition(value))
        if source is not None and source[1] == q:
            return source[0]
        return self._kernel([value], q)

    def _clip(self, expr: relax.Expr) -> relax.Expr | None:
        value = self._kernel([expr.args[0]], "float32")
        return None if value is None else compat.call_with(expr, [self.emit(value), *expr.args[1:]])

    def _kernel(self, values: list[relax.Expr], output: TensorKind) -> relax.Expr | None:
        sources = [dialect.match_dequantize(self.definition(value)) for value in values]
        if all(source is None for source in sources):
            return None
        if any(str(compat.type_of(value).dtype) != "float32" for value in values):
            return None
        if sources[0] is None:  # the first summand is the one that is dequantized by itself
            values, sources = values[::-1], sources[::-1]
        shape = dialect.shape_of(values[0])
        if len(shape) < 2 or not all(isinstance(size, int) for size in shape[1:]):
            return None
        operands = [v if s is None else s[0] for v, s in zip(values, sources, strict=True)]
        kinds: list[TensorKind] = ["float32" if s is None else s[1] for s in sources]
        batch = dialect.static_batch(values[0])
        spec = ElementwiseSpec(batch, tuple(shape[1:]), tuple(kinds), Epilogue(outputs=(output,)))
        return dialect.kernel(spec, operands, shape[0])


FoldElementwise = as_pass(_Fold, "FoldElementwise")
