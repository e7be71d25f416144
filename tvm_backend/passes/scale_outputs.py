"""Let the scale and bias of a kernel give values in steps of its first output.

Before::

    lv = cat.kernel(x, w, scale, bias, ConvSpec(..., clip=(0.0, 6.0), outputs=(q,)))

After::

    lv = cat.kernel(x, w, scale / q.scale, bias / q.scale,
                    ConvSpec(..., clip=(0.0, 6.0 / q.scale), outputs=(q with a scale of 1,), bounded=True))

So the multiplication before rounding falls away.  Whatever else the epilogue holds, further outputs, the branch and the
residual, is expressed in the same unit; a float32 output or residual is not, and such kernels stay as they are.  Sums
are bounded by the weights, which is known here: where no value can leave int32, the specification says so.

It is the last pass: the parameters in a specification then serve its arithmetic only and no longer say what the
integers stand for.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tvm_backend import compat, dialect
from tvm_backend.kernels.spec import ConvSpec, Epilogue, LinearSpec, QParams, TensorKind
from tvm_backend.passes.rewriter import Rewriter, as_pass

__all__ = ["ScaleOutputs"]

_LIMIT = 2.0**30


def _in_steps(kind: TensorKind | None, unit: float) -> TensorKind | None:
    return dataclasses.replace(kind, scale=kind.scale / unit) if isinstance(kind, QParams) else kind


def _largest_sum(spec: Any, weight: np.ndarray) -> np.ndarray:
    """The largest magnitude that each channel's sum can have."""
    low, high = (-128, 127) if spec.input.signed else (0, 255)
    reach = max(high - spec.input.zero_point, spec.input.zero_point - low)
    total: np.ndarray = reach * np.abs(weight.reshape(weight.shape[0], -1).astype(np.float64)).sum(axis=1)
    return total


def _bounded(epilogue: Epilogue, largest: float) -> bool:
    """Whether values up to `largest` fit into int32 in steps of every integer output, residual included."""
    residual, branch = epilogue.residual, epilogue.branch
    if branch is not None:
        largest = max(largest, 255 * branch.scale)
    if isinstance(residual, QParams):
        largest += 255 * residual.scale
    outputs = [kind for kind in (*epilogue.outputs, branch) if isinstance(kind, QParams)]
    return all(largest / kind.scale < _LIMIT for kind in outputs)


class _Scale(Rewriter):
    def visit(self, expr: Any) -> Any | None:
        call = dialect.match_kernel(expr, ConvSpec, LinearSpec)
        if call is None or call.attributes.epilogue.bounded:
            return None
        epilogue = call.attributes.epilogue
        if "float32" in (*epilogue.outputs, epilogue.residual):
            return None
        data, weight, scale, bias, *rest = call.args
        values = compat.constant_value(weight)
        unit = epilogue.outputs[0].scale
        low, high = (None if bound is None else bound / unit for bound in epilogue.clip)
        scales = (dialect.float_array(scale) / np.float64(unit)).astype(np.float32)
        biases = (dialect.float_array(bias) / np.float64(unit)).astype(np.float32)
        in_steps = dataclasses.replace(
            epilogue,
            clip=(low, high),
            residual=_in_steps(epilogue.residual, unit),
            outputs=tuple(_in_steps(kind, unit) for kind in epilogue.outputs),
            branch=_in_steps(epilogue.branch, unit),
        )
        largest = float((_largest_sum(call.attributes, values) * np.abs(scales) + np.abs(biases)).max())
        if not _bounded(in_steps, largest):
            return None
        spec = dataclasses.replace(call.attributes, epilogue=dataclasses.replace(in_steps, bounded=True))
        args = [data, weight, compat.constant(scales), compat.constant(biases), *rest]
        return dialect.kernel(spec, args, dialect.shape_of(data)[0])


ScaleOutputs = as_pass(_Scale, "ScaleOutputs")
