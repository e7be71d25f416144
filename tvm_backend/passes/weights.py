"""Read a quantized weight out of the graph: integers, scales, zero points folded in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from tvm import relax

from tvm_backend import compat, dialect

__all__ = ["QuantizedWeight", "read_weight"]


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight ``values * scales``, the scales running along `axis`.

    Parameters
    ----------
    values : numpy.ndarray of int8
        The integers with their zero points subtracted.
    scales : numpy.ndarray of float64, shape (channels,)
        One step for each output channel.
    bits : int
        How many bits the integers need by their declared range.
    """

    values: np.ndarray
    scales: np.ndarray
    bits: int


def _bits(qmin: int, qmax: int) -> int:
    return max(2, math.ceil(math.log2(qmax - qmin + 1)))


def read_weight(definition: relax.Expr, axis: int) -> QuantizedWeight | None:
    """Read the dequantization of a constant; None when `definition` is anything else.

    Parameters
    ----------
    definition : relax.Expr
        What the weight operand is bound to.
    axis : int
        The axis of output channels, along which scales may differ.
    """
    call = dialect.match(definition, "dequantize", "dequantize_per_channel")
    if call is None or not compat.is_constant(call.args[0]):
        return None
    values = compat.constant_value(call.args[0]).astype(np.int32)
    axis %= values.ndim
    channels = values.shape[axis]
    if call.name == "dequantize":
        q = call.attributes
        scales, zero_points = np.full(channels, q.scale), np.full(channels, q.zero_point)
        bits = _bits(q.qmin, q.qmax)
    else:
        if call.attributes["axis"] % values.ndim != axis or not all(
            compat.is_constant(a) for a in call.args[1:]
        ):
            return None
        scales = compat.constant_value(call.args[1]).astype(np.float64)
        zero_points = compat.constant_value(call.args[2]).astype(np.int32)
        bits = _bits(call.attributes["qmin"], call.attributes["qmax"])
    shape = [1] * values.ndim
    shape[axis] = channels
    values = values - zero_points.reshape(shape)
    if values.min() < -128 or values.max() > 127:  # an 8-bit weight with a zero point far from the middle
        return None
    return QuantizedWeight(values.astype(np.int8), scales.astype(np.float64), min(bits, 8))
