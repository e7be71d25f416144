"""Make kernels of rotations by two constant matrices, which quantized transformers compute in front of some layers.

Before::

    lv = R.matmul(x, right)                              # (n, 257, 48, 32), (32, 32)
    lv1 = R.matmul(left, lv)                             # (48, 48)

After::

    lv = R.reshape(x, R.shape([n * 257, 1536]))
    lv1 = cat.kernel(lv, factors, core, RotationSpec(outer=4, core=12, inner=32))
    lv2 = R.reshape(lv1, R.shape([n, 257, 48, 32]))

Between the two there may be changes of shape, and the left one may be repeated for each row, as PyTorch's export has it.

The matrix on the right is one of Sylvester's with a factor for each row, and that on the left may be, in part: what is left of it is
the core.  Others stay products, and so do very large cores and narrow matrices.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import relax

from tvm_backend import compat, dialect
from tvm_backend.kernels.spec import Epilogue, RotationSpec
from tvm_backend.passes.rewriter import Rewriter, as_pass

__all__ = ["FoldRotation", "doublings"]

_LEAST_INNER = 4
"""Columns of the matrix on the right, which are the lanes of the kernel's vectors."""

_GREATEST_CORE = 256
"""Rows of what is multiplied as it stands: the kernels of products are better at more."""


def doublings(matrix: NDArray[Any]) -> tuple[NDArray[Any], int, NDArray[Any]]:
    """Write a square matrix as ``diag(factors) (H x core)`` with the largest of Sylvester's matrices that there is in it.

    Parameters
    ----------
    matrix : ndarray
        (n, n), any real type.

    Returns
    -------
    factors : ndarray
        (n,), float64.
    size : int
        Rows of ``H``, a power of two; 1 where there is none.
    core : ndarray
        (n / size, n / size), float64.
    """
    rows = np.asarray(matrix, float)
    scale = np.abs(rows).mean()
    if scale == 0 or not np.allclose(np.abs(rows), scale, rtol=1e-5, atol=0):
        return np.ones(len(rows)), 1, rows
    signs = np.sign(rows)
    core = signs * signs[:, :1]
    size = 1
    while len(core) % 2 == 0:
        half = core[: len(core) // 2, : len(core) // 2]
        if not np.array_equal(core, np.kron([[1, 1], [1, -1]], half)):
            break
        core, size = half, 2 * size
    return signs[:, 0] * scale, size, core


class _Fold(Rewriter):
    def visit(self, expr: relax.Expr) -> relax.Expr | None:
        if compat.op_name(expr) != "matmul":
            return None
        *leading, a, b = dialect.shape_of(self.current)
        given = dialect.shape_of(expr.args[1])
        if (
            not leading
            or len(given) != len(leading) + 2
            or not all(map(compat.same_size, given, [*leading, a, b]))
        ):
            return None  # one product for several matrices on the left
        left = self._repeated(expr.args[0])
        product = self._reshaped(expr.args[1])
        inner = self.definition(product)
        if compat.op_name(inner) != "matmul" or not self.sole_user(product):
            return None
        x, right = inner.args
        if not (_is_square(left, a) and _is_square(right, b)):
            return None
        if any(str(compat.type_of(arg).dtype) != "float32" for arg in (x, left, right)):
            return None
        columns, size, rest = doublings(compat.constant_value(right).reshape(b, b))
        if size != b or b < _LEAST_INNER:
            return None
        # From the left a matrix acts as its transpose does from the right.
        rows, outer, core = doublings(compat.constant_value(left).reshape(a, a).T)
        if len(core) > _GREATEST_CORE:
            return None
        factors = np.kron(rows, columns * rest.item())
        if len(core) == 1:
            factors *= core.item()
        # Rows of both products follow each other in memory however they are grouped.
        count = math.prod(leading[1:], start=leading[0])
        flat = self.emit(relax.op.reshape(x, [count, a * b]))
        spec = RotationSpec(dialect.static_batch(flat), outer, len(core), b, Epilogue())
        given = [factors, core] if len(core) > 1 else [factors]
        constants = [compat.constant(np.ascontiguousarray(each, np.float32)) for each in given]
        out = dialect.kernel(spec, [flat, *constants], count)
        return relax.op.reshape(self.emit(out), [*leading, a, b])

    def _reshaped(self, expr: relax.Expr) -> relax.Expr:
        """What changes of shape were given; each is used once."""
        while self.sole_user(expr) and compat.op_name(made := self.definition(expr)) == "reshape":
            expr = made.args[0]
        return expr

    def _repeated(self, expr: relax.Expr) -> relax.Expr:
        """The matrix, or matrices, that leading axes were added to, and merged."""
        while compat.op_name(made := self.definition(expr)) in ("reshape", "broadcast_to"):
            if dialect.shape_of(made.args[0])[-2:] != dialect.shape_of(expr)[-2:]:
                break  # other matrices
            expr = made.args[0]
        return expr


def _is_square(expr: relax.Expr, size: Any) -> bool:
    """Whether an expression is one constant matrix of that many rows and columns."""
    if not isinstance(size, int) or not compat.is_constant(expr):
        return False
    shape = dialect.shape_of(expr)
    return shape[-2:] == [size, size] and math.prod(shape) == size * size


FoldRotation = as_pass(_Fold, "FoldRotation")
