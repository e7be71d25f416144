"""Pool integers instead of the numbers they stand for.

Before::

    lv = cat.dequantize(x, q)
    lv1 = R.mean(lv, axis=[-1, -2], keepdims=True)    # or nn.avg_pool2d, nn.max_pool2d, nn.adaptive_avg_pool2d; NCHW

After::

    lv = R.permute_dims(x, [0, 2, 3, 1])
    lv1 = cat.kernel(lv, PoolSpec("avg", ...))        # NHWC, float32
    lv2 = R.permute_dims(lv1, [0, 3, 1, 2])
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from tvm_backend import compat, dialect
from tvm_backend.kernels.spec import Epilogue, PoolSpec, QParams
from tvm_backend.passes.fold_convolution import NCHW_TO_NHWC, NHWC_TO_NCHW
from tvm_backend.passes.rewriter import Rewriter, as_pass

__all__ = ["FoldPooling"]


class _Fold(Rewriter):
    def visit(self, expr: relax.Expr) -> relax.Expr | None:
        name = compat.op_name(expr)
        if name not in ("mean", "nn.avg_pool2d", "nn.max_pool2d", "nn.adaptive_avg_pool2d"):
            return None
        data = dialect.match_dequantize(self.definition(expr.args[0]))
        if data is None:
            return None
        x, q = data
        shape = dialect.shape_of(x)
        if name == "mean" and len(shape) == 3:
            return self._mean_of_rows(expr, x, q)
        if len(shape) != 4 or not all(isinstance(size, int) for size in shape[1:]):
            return None
        arguments = (
            self._global(expr, shape) if name in ("mean", "nn.adaptive_avg_pool2d") else self._window(expr)
        )
        if arguments is None:
            return None
        x = self.emit(relax.op.permute_dims(x, NCHW_TO_NHWC))
        spec = PoolSpec(
            kind="max" if name == "nn.max_pool2d" else "avg",
            batch=dialect.static_batch(x),
            height=shape[2],
            width=shape[3],
            channels=shape[1],
            input=q,
            epilogue=Epilogue(),
            **arguments,
        )
        out = self.emit(dialect.kernel(spec, [x], shape[0]))
        out = self.emit(relax.op.permute_dims(out, NHWC_TO_NCHW))
        if name == "mean" and not expr.attrs.keepdims:
            return relax.op.squeeze(out, [2, 3])
        return out

    def _mean_of_rows(self, expr: relax.Expr, x: relax.Expr, q: QParams) -> relax.Expr | None:
        """The mean over time of (N, C, T) or over tokens of (N, T, C): a global average of pixels in one row."""
        axes = [axis % 3 for axis in compat.ints(expr.attrs.axis)] if expr.attrs.axis is not None else []
        if axes not in ([1], [2]):
            return None
        if axes == [2]:
            x = self.emit(relax.op.permute_dims(x, [0, 2, 1]))
        batch, length, channels = dialect.shape_of(x)
        if not isinstance(length, int) or not isinstance(channels, int):
            return None
        x = self.emit(relax.op.expand_dims(x, [1]))
        window = (1, length)
        static = dialect.static_batch(x)
        spec = PoolSpec("avg", static, 1, length, channels, window, window, q, Epilogue())
        out = self.emit(dialect.kernel(spec, [x], batch))
        if not expr.attrs.keepdims:
            return relax.op.squeeze(out, [1, 2])
        out = self.emit(relax.op.squeeze(out, [1]))
        return out if axes == [1] else relax.op.permute_dims(out, [0, 2, 1])

    def _global(self, expr: relax.Expr, shape: list[Any]) -> dict[str, Any] | None:
        if compat.op_name(expr) == "mean":
            if expr.attrs.axis is None or sorted(axis % 4 for axis in compat.ints(expr.attrs.axis)) != [2, 3]:
                return None
        elif expr.attrs.output_size is None or compat.ints(expr.attrs.output_size) != [1, 1]:
            return None
        return {"kernel": (shape[2], shape[3]), "stride": (shape[2], shape[3])}

    def _window(self, expr: relax.Expr) -> dict[str, Any] | None:
        attrs = expr.attrs
        padding = compat.ints(attrs.padding)
        if str(attrs.layout) != "NCHW" or any(step != 1 for step in compat.ints(attrs.dilation)):
            return None
        kernel, stride = compat.ints(attrs.pool_size), compat.ints(attrs.strides)
        if max(padding[0], padding[2]) >= kernel[0] or max(padding[1], padding[3]) >= kernel[1]:
            return None
        return {
            "kernel": (kernel[0], kernel[1]),
            "stride": (stride[0], stride[1]),
            "padding": (padding[0], padding[1], padding[2], padding[3]),
            "ceil_mode": bool(attrs.ceil_mode),
            "count_include_pad": bool(attrs.count_include_pad),
        }


FoldPooling = as_pass(_Fold, "FoldPooling")
