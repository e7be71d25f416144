"""What packed weights of every machine have in common."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cat_plugin.errors import CompileError

__all__ = ["as_int8", "check_span", "zero_point_sums"]


def as_int8(weight: NDArray[Any]) -> NDArray[np.int8]:
    """Integer weights as int8; a :class:`CompileError` where they do not fit."""
    if weight.min() < -128 or weight.max() > 127:
        raise CompileError(f"weights reach {weight.min()}..{weight.max()}; kernels take int8 weights")
    return np.asarray(weight).astype(np.int8)


def check_span(spans: NDArray[Any], bits: int) -> None:
    """Require that codes of `bits` bits hold each channel's weights.

    Parameters
    ----------
    spans : ndarray of int
        For each channel the difference of its largest and its smallest weight, zero among them.
    bits : int
        Bits of a code.

    Raises
    ------
    CompileError
        A channel's weights span more values.
    """
    span = int(spans.max()) + 1
    if span > 1 << bits:
        raise CompileError(
            f"a channel's weights span {span} values, more than {bits} bits hold; give the layer more weight bits"
        )


def zero_point_sums(weight: NDArray[Any], zero_point: int) -> NDArray[np.int32]:
    """``-zero_point * sum(weight)`` for each output channel."""
    sums = weight.reshape(weight.shape[0], -1).astype(np.int64).sum(axis=1)
    result: NDArray[np.int32] = (-zero_point * sums).astype(np.int32)
    return result
