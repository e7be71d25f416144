"""Make an integer convolution of ``conv(dequantize(x), dequantize(w))``.

Before (one- and two-dimensional, any groups)::

    lv = cat.dequantize(x, q)
    lv1 = cat.dequantize_per_channel(w, scales, zero_points, axis=0)
    lv2 = R.nn.conv2d(lv, lv1)                       # NCHW

After::

    lv = R.permute_dims(x, [0, 2, 3, 1])
    lv1 = cat.kernel(lv, w, scales * q.scale, zeros, ConvSpec(...))   # NHWC, float32
    lv2 = R.permute_dims(lv1, [0, 3, 1, 2])

The sums are those of the float convolution: ``conv = q.scale * scales[c] * sum((x - q.zero_point) * (w - zero_points[c]))``,
with the same zeros around the border, because a padded place holds the zero point.  A padding operator in front of the
convolution becomes part of it.
"""

from __future__ import annotations

import numpy as np
from tvm import relax

from tvm_backend import compat, dialect
from tvm_backend.kernels.spec import ConvSpec, Epilogue, QParams
from tvm_backend.passes.rewriter import Rewriter, as_pass
from tvm_backend.passes.weights import read_weight

__all__ = [
    "NCHW_TO_NHWC",
    "NHWC_TO_NCHW",
    "FoldConvolution",
]

NCHW_TO_NHWC = [0, 2, 3, 1]
NHWC_TO_NCHW = [0, 3, 1, 2]


class _Fold(Rewriter):
    def visit(self, expr: relax.Expr) -> relax.Expr | None:
        name = compat.op_name(expr)
        if name not in ("nn.conv2d", "nn.conv1d"):
            return None
        data = dialect.match_dequantize(self.definition(expr.args[0]))
        weight = read_weight(self.definition(expr.args[1]), axis=0)
        if data is None or weight is None:
            return None
        if str(expr.attrs.data_layout) not in ("NCHW", "NCW") or str(expr.attrs.kernel_layout) not in (
            "OIHW",
            "OIW",
        ):
            return None
        x, q = data
        flat = name == "nn.conv1d"
        stride, dilation = compat.ints(expr.attrs.strides), compat.ints(expr.attrs.dilation)
        padding = compat.ints(expr.attrs.padding)
        values = weight.values
        if flat:
            padding = [0, padding[0], 0, padding[1]]
            stride, dilation, values = [1, *stride], [1, *dilation], values[:, :, None]
        x, padding = self._absorb_padding(x, q, padding)
        x = self._channels_last(x, flat)
        batch, height, width, channels = dialect.shape_of(x)
        if not all(isinstance(size, int) for size in (height, width, channels)):
            return None
        spec = ConvSpec(
            batch=dialect.static_batch(x),
            height=height,
            width=width,
            in_channels=channels,
            out_channels=values.shape[0],
            kernel=(values.shape[2], values.shape[3]),
            input=q,
            epilogue=Epilogue(),
            stride=(stride[0], stride[1]),
            padding=(padding[0], padding[1], padding[2], padding[3]),
            dilation=(dilation[0], dilation[1]),
            groups=int(expr.attrs.groups),
            weight_bits=weight.bits,
        )
        scale = (weight.scales * q.scale).astype(np.float32)
        constants = [compat.constant(a) for a in (values, scale, np.zeros_like(scale))]
        out = self.emit(dialect.kernel(spec, [x, *constants], batch))
        if flat:
            out = self.emit(relax.op.squeeze(out, [1]))
            return relax.op.permute_dims(out, [0, 2, 1])
        return relax.op.permute_dims(out, NHWC_TO_NCHW)

    def _absorb_padding(self, x: relax.Expr, q: QParams, padding: list[int]) -> tuple[relax.Expr, list[int]]:
        """Take a padding with the zero point, of the two last axes only, into the convolution."""
        pad = self.definition(x)
        if compat.op_name(pad) != "nn.pad" or float(pad.attrs.pad_value) != q.zero_point:
            return x, padding
        widths = compat.ints(pad.attrs.pad_width)
        if len(widths) == 6:
            widths = [*widths[:4], 0, 0, *widths[4:]]
        if str(pad.attrs.pad_mode) != "constant" or any(widths[:4]) or min(widths) < 0:
            return x, padding
        extra = [widths[4], widths[6], widths[5], widths[7]]
        return pad.args[0], [a + b for a, b in zip(padding, extra, strict=True)]

    def _channels_last(self, x: relax.Expr, flat: bool) -> relax.Expr:
        if not flat:
            return self.emit(relax.op.permute_dims(x, NCHW_TO_NHWC))
        return self.emit(relax.op.expand_dims(self.emit(relax.op.permute_dims(x, [0, 2, 1])), [1]))


FoldConvolution = as_pass(_Fold, "FoldConvolution")
