"""Make one kernel of the parameter-free shortcut of CIFAR ResNets: every other pixel, zero channels around.

Before (integers, channels last)::

    lv = R.strided_slice(x, (1,), (0,), (END,), (2,))
    lv1 = R.strided_slice(lv, (2,), (0,), (END,), (2,))
    lv2 = R.nn.pad(lv1, (0, 0, 0, 0, 0, 0, 8, 8), pad_value=zero_point)
    lv3 = cat.dequantize(lv2, q)

After::

    lv2 = cat.kernel(x, SubsampleSpec(...))
    lv3 = cat.dequantize(lv2, q)
"""

from __future__ import annotations

from tvm import relax

from tvm_backend import compat, dialect
from tvm_backend.kernels.spec import SubsampleSpec
from tvm_backend.passes.rewriter import Rewriter, as_pass

__all__ = ["FoldSubsample"]


class _Fold(Rewriter):
    def visit(self, expr: relax.Expr) -> relax.Expr | None:
        found = dialect.match_dequantize(expr)
        if found is None:
            return None
        value, q = found
        before, after, stride = 0, 0, [1, 1]
        step = self.definition(value)
        if compat.op_name(step) == "nn.pad":
            widths = compat.ints(step.attrs.pad_width)
            if (
                len(widths) != 8
                or any(widths[:6])
                or min(widths) < 0
                or float(step.attrs.pad_value) != q.zero_point
            ):
                return None
            before, after = widths[6:]
            value = step.args[0]
            step = self.definition(value)
        while compat.op_name(step) == "strided_slice":
            steps = self._steps(step)
            if steps is None:
                break
            stride = [a * b for a, b in zip(stride, steps, strict=True)]
            value = step.args[0]
            step = self.definition(value)
        shape = dialect.shape_of(value)
        if (before, after, stride) == (0, 0, [1, 1]) or len(shape) != 4:
            return None
        if not all(isinstance(size, int) for size in shape[1:]):
            return None
        height, width, channels = shape[1:]
        spec = SubsampleSpec(
            batch=dialect.static_batch(value),
            height=height,
            width=width,
            channels=channels,
            stride=(stride[0], stride[1]),
            before=before,
            after=after,
            input=q,
        )
        return dialect.dequantize(self.emit(dialect.kernel(spec, [value], shape[0])), q)

    def _steps(self, call: relax.Expr) -> list[int] | None:
        """The vertical and horizontal step of a slice that takes whole axes; None for any other slice."""
        shape = dialect.shape_of(call.args[0])
        axes, begins, ends, *strides = [[int(item.value) for item in arg.fields] for arg in call.args[1:]]
        steps = [1, 1]
        for i, axis in enumerate(axes):
            if (
                axis % 4 not in (1, 2)
                or begins[i] != 0
                or not isinstance(shape[axis], int)
                or ends[i] < shape[axis]
            ):
                return None
            steps[axis % 4 - 1] = strides[0][i] if strides else 1
        return steps if min(steps) >= 1 else None


FoldSubsample = as_pass(_Fold, "FoldSubsample")
