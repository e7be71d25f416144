"""Take ReLU, ReLU6 and clip into the epilogue of the kernel in front.

Before::

    lv = cat.kernel(x, w, scale, bias, ConvSpec(...))
    lv1 = R.nn.relu(lv)

After::

    lv1 = cat.kernel(x, w, scale, bias, ConvSpec(..., clip=(0.0, None)))
"""

from __future__ import annotations

from tvm import relax

from tvm_backend import compat, dialect
from tvm_backend.passes.rewriter import Rewriter, as_pass

__all__ = [
    "Bounds",
    "FuseClip",
]

Bounds = tuple[float | None, float | None]


def _bounds(expr: relax.Expr) -> Bounds | None:
    name = compat.op_name(expr)
    if name == "nn.relu":
        return 0.0, None
    if name == "nn.relu6":
        return 0.0, 6.0
    if name == "clip":
        low, high = (compat.number(arg) for arg in expr.args[1:])
        return (None if low == float("-inf") else low), (None if high == float("inf") else high)
    return None


def _then(first: Bounds, second: Bounds) -> Bounds:
    """One clip that does what `first` and then `second` do."""

    def clip(value: float | None, below: float) -> float | None:
        low, high = second
        value = below if value is None else value
        if low is not None:
            value = max(value, low)
        if high is not None:
            value = min(value, high)
        return None if abs(value) == float("inf") else value

    return clip(first[0], float("-inf")), clip(first[1], float("inf"))


class _Fuse(Rewriter):
    def visit(self, expr: relax.Expr) -> relax.Expr | None:
        bounds = _bounds(expr)
        if bounds is None or not self.sole_user(expr.args[0]):
            return None
        call = dialect.match_kernel(self.definition(expr.args[0]))
        epilogue = None if call is None else dialect.epilogue_of(call.attributes)
        if call is None or epilogue is None or epilogue.outputs != ("float32",):
            return None
        spec = dialect.with_epilogue(call.attributes, clip=_then(epilogue.clip, bounds))
        return dialect.kernel(spec, call.args, dialect.shape_of(expr.args[0])[0])


FuseClip = as_pass(_Fuse, "FuseClip")
