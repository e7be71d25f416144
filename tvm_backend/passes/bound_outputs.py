"""Say of a kernel whether its values can leave what an integer holds.

Before::

    lv = cat.kernel(x, w, scale, bias, ConvSpec(..., outputs=(q,)))

After::

    lv = cat.kernel(x, w, scale, bias, ConvSpec(..., outputs=(q,), bounded=True))

Sums are bounded by the weights, which are known here: where no value can come near the ends of int32 in steps of any
integer output, the specification says so, and saturating instructions do what a clip would do.  No result changes.
A float32 residual has no bound, and a kernel without integer outputs needs none: they stay as they are.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from tvm import relax

from tvm_backend import compat, dialect
from tvm_backend.kernels.spec import Epilogue, GroupedLinearSpec, QParams, WeightedSpec
from tvm_backend.passes.rewriter import Rewriter, as_pass

__all__ = ["BoundOutputs"]

_LIMIT = 2.0**30


def _largest_sum(spec: WeightedSpec, weight: np.ndarray) -> np.ndarray:
    """The largest magnitude that each channel's sum can have."""
    low, high = (-128, 127) if spec.input.signed else (0, 255)
    reach = max(high - spec.input.zero_point, spec.input.zero_point - low)
    total: np.ndarray = reach * np.abs(weight.reshape(weight.shape[0], -1).astype(np.float64)).sum(axis=1)
    return total


def _bounded(epilogue: Epilogue, largest: float) -> bool:
    """Whether values up to `largest` fit into int32 in steps of every integer output, residual included."""
    residual, branch = epilogue.residual, epilogue.branch
    if residual == "float32":
        return False
    if branch is not None:
        largest = max(largest, 255 * branch.scale)
    if isinstance(residual, QParams):
        largest += 255 * residual.scale
    outputs = [kind for kind in (*epilogue.outputs, branch) if isinstance(kind, QParams)]
    return bool(outputs) and all(largest / kind.scale < _LIMIT for kind in outputs)


class _Bound(Rewriter):
    def visit(self, expr: relax.Expr) -> relax.Expr | None:
        call = dialect.match_kernel(expr, WeightedSpec)
        if call is None or call.attributes.epilogue.bounded:
            return None
        if isinstance(call.attributes, GroupedLinearSpec):  # scales of rows come at run time
            return None
        data, weight, scale, bias, *_ = call.args
        spec, epilogue = call.attributes, call.attributes.epilogue
        sums = _largest_sum(spec, compat.constant_value(weight))
        scales, biases = dialect.float_array(scale), dialect.float_array(bias)
        if not _bounded(epilogue, float((sums * np.abs(scales) + np.abs(biases)).max())):
            return None
        spec = dataclasses.replace(spec, epilogue=dataclasses.replace(epilogue, bounded=True))
        return dialect.kernel(spec, list(call.args), dialect.shape_of(data)[0])


BoundOutputs = as_pass(_Bound, "BoundOutputs")
