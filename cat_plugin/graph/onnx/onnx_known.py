"""ONNX operators on known numbers: the arithmetic of sizes, in numpy, symbolic integers included."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from cat_plugin.graph.onnx.operators import KNOWN_ONLY, OPERATORS, Known, Step, Value, implements

__all__: list[str] = []

_INTEGERS = (2, 3, 4, 5, 6, 7, 12, 13)
_TYPES = {
    1: np.float32, 2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16, 6: np.int32, 7: np.int64, 9: np.bool_,
    10: np.float16, 11: np.float64, 12: np.uint32, 13: np.uint64,
}  # fmt: skip


def _plain(array: Any) -> np.ndarray[Any, Any]:
    """An object array without symbols in it as one of integers, so that dtypes mean something again."""
    values = np.asarray(array)
    if values.dtype == object and all(isinstance(value, int) for value in values.reshape(-1).tolist()):
        return values.astype(np.int64)
    return values


@implements("Shape", table=OPERATORS)
@implements("Shape", table=KNOWN_ONLY)
def _shape(step: Step, x: Value) -> Known:
    shape = list(x.array.shape if isinstance(x, Known) else x.shape)  # type: ignore[union-attr]
    sizes = np.empty(len(shape), dtype=object)
    sizes[:] = shape
    return Known(_plain(sizes[step.get("start", 0) : step.get("end", len(shape))]))


@implements("Size", table=OPERATORS)
def _size(step: Step, x: torch.Tensor) -> Known:
    size = np.empty((), dtype=object)
    size[()] = math.prod(x.shape)
    return Known(_plain(size))


def _elementwise(function: Any) -> Any:
    return lambda step, *values: Known(_plain(function(*(value.array for value in values))))


def _quotient(a: Any, b: Any) -> Any:
    # integers are divided towards zero; sizes are not negative, so // does it for symbols
    if a.dtype.kind == "f" or b.dtype.kind == "f":
        return a / b
    return a // b if object in (a.dtype, b.dtype) else np.trunc(a / b).astype(a.dtype)


def _rounded(rounding: Any) -> Any:
    def convert(step: Step, x: Known) -> Known:
        if x.array.dtype == object:
            return Known(np.frompyfunc(rounding, 1, 1)(x.array))
        return Known(getattr(np, rounding.__name__)(x.array))

    return convert


for _op, _function in {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": _quotient, "Neg": np.negative,
    "Max": lambda *a: np.maximum.reduce(a), "Min": lambda *a: np.minimum.reduce(a), "Not": np.logical_not,
    "Identity": lambda a: a, "Where": lambda c, a, b: np.where(c.astype(bool), a, b),
    "Equal": lambda a, b: np.equal(a, b).astype(bool), "Less": lambda a, b: np.less(a, b).astype(bool),
    "Greater": lambda a, b: np.greater(a, b).astype(bool), "Mod": np.mod, "Sqrt": np.sqrt,
}.items():  # fmt: skip
    KNOWN_ONLY[_op] = _elementwise(_function)
KNOWN_ONLY["Floor"], KNOWN_ONLY["Ceil"] = _rounded(math.floor), _rounded(math.ceil)


@implements("Cast", table=KNOWN_ONLY)
def _cast(step: Step, x: Known) -> Known:
    to = step.get("to")
    if to not in _TYPES:
        raise step.refuse(f"a cast to type {to}; expected one of numpy's")
    if x.array.dtype != object:
        return Known(x.array.astype(_TYPES[to]))
    function = torch.sym_int if to in _INTEGERS else torch.sym_float
    return Known(np.frompyfunc(function, 1, 1)(x.array))


@implements("Gather", table=KNOWN_ONLY)
def _gather(step: Step, x: Known, indices: Known) -> Known:
    return Known(_plain(np.take(x.array, indices.array.astype(np.int64), axis=step.get("axis", 0))))


@implements("Concat", table=KNOWN_ONLY)
def _concat(step: Step, *values: Known) -> Known:
    return Known(_plain(np.concatenate([value.array for value in values], axis=step.get("axis"))))


@implements("Squeeze", table=KNOWN_ONLY)
def _squeeze(step: Step, x: Known, axes: Known | None = None) -> Known:
    given = step.option("axes", axes)
    return Known(np.squeeze(x.array, None if given is None else tuple(given)))


@implements("Unsqueeze", table=KNOWN_ONLY)
def _unsqueeze(step: Step, x: Known, axes: Known | None = None) -> Known:
    return Known(np.expand_dims(x.array, tuple(step.option("axes", axes) or ())))


@implements("Reshape", table=KNOWN_ONLY)
def _reshape(step: Step, x: Known, shape: Known) -> Known:
    sizes = [x.array.shape[i] if size == 0 else size for i, size in enumerate(shape.numbers())]
    return Known(x.array.reshape(sizes))


@implements("Slice", table=KNOWN_ONLY)
def _slice(
    step: Step,
    x: Known,
    starts: Known | None = None,
    ends: Known | None = None,
    axes: Known | None = None,
    steps: Known | None = None,
) -> Known:
    first, last = step.option("starts", starts) or [], step.option("ends", ends) or []
    along = step.option("axes", axes) or list(range(len(first)))
    strides = step.option("steps", steps) or [1] * len(first)
    index = [slice(None)] * x.array.ndim
    for axis, start, end, stride in zip(along, first, last, strides, strict=True):
        index[axis] = slice(start, None if stride < 0 and end < -(2**31) else end, stride)
    return Known(x.array[tuple(index)])


@implements("ReduceProd", table=KNOWN_ONLY)
def _product(step: Step, x: Known, axes: Known | None = None) -> Known:
    result = np.empty((), dtype=object)
    result[()] = math.prod(x.numbers())
    return Known(_plain(result.reshape(1) if step.get("keepdims", 1) else result))


@implements("Range", table=KNOWN_ONLY)
def _range(step: Step, start: Known, limit: Known, delta: Known) -> Any:
    values = [value.numbers()[0] for value in (start, limit, delta)]
    if any(value.array.dtype == object for value in (start, limit, delta)):
        return torch.arange(*values)
    return Known(np.arange(*values, dtype=start.array.dtype))


@implements("ConstantOfShape", table=KNOWN_ONLY)
def _constant_of_shape(step: Step, shape: Known) -> Any:
    fill = np.asarray(step.get("value", np.zeros(1, np.float32))).reshape(-1)
    if shape.array.dtype == object:
        return torch.full(shape.numbers(), fill.tolist()[0], dtype=torch.from_numpy(fill.copy()).dtype)
    return Known(np.full(shape.numbers(), fill[0]))


@implements("Constant", table=KNOWN_ONLY)
def _constant(step: Step) -> Known:
    for name, dtype in (("value_float", np.float32), ("value_int", np.int64)):
        if name in step.attributes:
            return Known(np.asarray(step.get(name), dtype=dtype))
    for name, dtype in (("value_floats", np.float32), ("value_ints", np.int64)):
        if name in step.attributes:
            return Known(np.asarray(step.get(name), dtype=dtype))
    if "value" not in step.attributes:
        raise step.refuse("a constant of strings or a sparse one; expected numbers")
    return Known(np.asarray(step.get("value")))
