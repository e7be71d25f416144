"""Make kernels of ``matmul(x, y)`` where both are computed at run time.

Before::

    lv = R.permute_dims(k, axes=[0, 2, 1])
    lv1 = R.matmul(q, lv)                                # (n, rows, inner), (n, inner, columns)

After::

    lv1 = cat.kernel(q, k, ProductSpec(transposed=True, ...))

Where both are integers that are dequantized, the kernel takes the integers.  Leading axes beyond the first, the heads of attention, are
merged with it and split again; one matrix for all rows is taken as well.  On a CUDA device kernels take pairs of integers only.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import relax

from tvm_backend import compat, dialect
from tvm_backend.kernels.spec import DequantizeSpec, Epilogue, ProductSpec, QParams, TensorKind
from tvm_backend.passes.rewriter import Rewriter, as_pass

__all__ = ["FoldIntegerProduct", "FoldProduct"]


class _Fold(Rewriter):
    integers_only = False

    def visit(self, expr: relax.Expr) -> relax.Expr | None:
        if compat.op_name(expr) != "matmul":
            return None
        first, second = (dialect.shape_of(arg) for arg in expr.args)
        shared = len(second) == 2
        if len(first) < (2 if shared else 3) or not self._fits(first, second, shared):
            return None
        if any(str(compat.type_of(arg).dtype) != "float32" for arg in (*expr.args, self.current)):
            return None
        *leading, rows, inner = first
        columns = second[-1]
        if shared:
            leading, rows = [*leading, rows], 1
        result = [*leading, columns] if shared else [*leading, rows, columns]
        left, right = expr.args
        kinds: tuple[TensorKind, TensorKind] = ("float32", "float32")
        read = self._integers(left), self._integers(right)
        if read[0] is not None and read[1] is not None:
            (left, one), (right, other) = read[0], read[1]
            kinds = (one, other)
        if self.integers_only and (shared or "float32" in kinds):
            return None
        right, transposed = self._untransposed(right)
        batch = math.prod(leading[1:], start=leading[0])
        if len(leading) > 1:
            shape = [batch, inner] if shared else [batch, rows, inner]
            left = self.emit(relax.op.reshape(left, shape))
            if not shared:
                right = self.emit(relax.op.reshape(right, [batch, *dialect.shape_of(right)[-2:]]))
        spec = ProductSpec(
            batch=dialect.static_batch(left),
            rows=rows,
            inner=inner,
            columns=columns,
            inputs=kinds,
            epilogue=Epilogue(),
            transposed=transposed,
            shared=shared,
        )
        out = dialect.kernel(spec, [left, right], dialect.shape_of(left)[0])
        if len(leading) == 1:
            return out
        return relax.op.reshape(self.emit(out), result)

    @staticmethod
    def _fits(left: list[Any], right: list[Any], shared: bool) -> bool:
        """Whether the matrices are of known size and go together pair by pair, or all with one."""
        if not all(isinstance(size, int) for size in (*left[-1 if shared else -2 :], *right[-2:])):
            return False
        if left[-1] > (1 << 31) // (255 * 255):
            return False
        return shared or all(
            compat.same_size(one, other) for one, other in zip(left[:-2], right[:-2], strict=True)
        )

    def _untransposed(self, right: relax.Expr) -> tuple[relax.Expr, bool]:
        """The matrix before its axes were exchanged, and whether they were."""
        made = self.definition(right)
        if compat.op_name(made) == "reshape":  # of the leading axes
            whole, (columns, inner) = made.args[0], dialect.shape_of(right)[-2:]
            plain, transposed = self._untransposed(whole)
            if transposed and dialect.shape_of(whole)[-2:] == [columns, inner]:
                shape = [*dialect.shape_of(right)[:-2], inner, columns]
                return self.emit(relax.op.reshape(plain, shape)), True
            return right, False
        if compat.op_name(made) == "permute_dims" and made.attrs.axes:
            axes = compat.ints(made.attrs.axes)
            last = len(axes) - 1
            if axes == [*range(last - 1), last, last - 1]:
                return made.args[0], True
        return right, False

    def _integers(self, x: relax.Expr) -> tuple[relax.Expr, QParams] | None:
        """What `x` is dequantized from."""
        call = dialect.match_kernel(self.definition(x), DequantizeSpec)
        if call is None or call.attributes.to_channels_first:
            return None
        return call.args[0], call.attributes.input


class _FoldIntegers(_Fold):
    integers_only = True


FoldProduct = as_pass(_Fold, "FoldProduct")
FoldIntegerProduct = as_pass(_FoldIntegers, "FoldIntegerProduct")
