"""ONNX's QuantizeLinear and DequantizeLinear as torch's ``quantized_decomposed`` operations, weights as int8 by channel.

A file in QDQ format becomes the graph that the engine itself hands over, so that what works on one works on the other.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cat_plugin.graph.onnx.operators import OPERATORS, Known, Step, Value, implements, to_tensor
from cat_plugin.torch_compat import register_quantized_decomposed

__all__ = ["WEIGHT", "integer_weights", "is_weight", "unrounded", "with_ranges"]

#: The operator that stands for a dequantized constant weight; files have none of this name.
WEIGHT = "DequantizeWeight"

_RANGES = {
    "int8": (-128, 127), "uint8": (0, 255), "int4": (-8, 7), "uint4": (0, 15), "int2": (-2, 1), "uint2": (0, 3),
}  # fmt: skip
_NAMES = {2: "uint8", 3: "int8", 21: "uint4", 22: "int4", 25: "uint2", 26: "int2"}
#: Half a step, with slack for float32's division.
_HALF = 0.51
register_quantized_decomposed()
_OPERATIONS = torch.ops.quantized_decomposed


def with_ranges(
    steps: list[Step], constants: dict[str, np.ndarray[Any, Any]]
) -> tuple[list[Step], dict[str, np.ndarray[Any, Any]]]:
    """Note at each quantize and dequantize step the integers that its type holds; types that torch lacks become 8 bits wide.

    Parameters
    ----------
    steps : list of Step
        Of the graph, in order.
    constants : dict of str to ndarray
        Under their names in the graph.

    Returns
    -------
    steps, constants
        The steps with an attribute ``range``, (least, greatest), where they quantize to 8 bits or fewer.
    """
    kinds = {name: array.dtype.name for name, array in constants.items()}
    noted = []
    for step in steps:
        if step.op == "QuantizeLinear":
            zero = step.inputs[2] if len(step.inputs) > 2 else ""
            kind = kinds.get(zero, _NAMES.get(step.get("output_dtype", 2), "another type"))
            kinds[step.outputs[0]] = kind
        elif step.op == "DequantizeLinear":
            kind = kinds.get(
                step.inputs[0], kinds.get(step.inputs[2] if len(step.inputs) > 2 else "", "uint8")
            )
        else:
            noted.append(step)
            if step.op in (
                "Identity",
                "Reshape",
                "Transpose",
                "Squeeze",
                "Unsqueeze",
                "Flatten",
                "MaxPool",
                "Concat",
            ):
                kinds[step.outputs[0]] = kinds.get(step.inputs[0], "")
            continue
        noted.append(replace(step, attributes={**step.attributes, "range": _RANGES.get(kind), "kind": kind}))
    plain = {
        name: array.astype(np.int8 if kinds[name].startswith("int") else np.uint8)
        if kinds[name] in ("int4", "uint4", "int2", "uint2")
        else array
        for name, array in constants.items()
    }
    return noted, plain


def is_weight(step: Step, known: dict[str, Known]) -> bool:
    """Whether a step dequantizes constants of 8 bits or fewer, which stay integers; wider ones, biases, become floats."""
    return step.op == "DequantizeLinear" and step.get("range") is not None and step.inputs[0] in known


def integer_weights(steps: list[Step], known: dict[str, Known]) -> list[Step]:
    """Write the weights of layers as int8 with one scale and zero point for each output channel, along axis 0.

    The values stay what they are: an unsigned weight and its zero point are both moved by half the range, one scale is
    repeated, and the matrix of a MatMul or Gemm is turned to that of a linear layer.
    """
    makers = {step.outputs[0]: step for step in steps if is_weight(step, known)}
    result: list[Step] = []
    for step in steps:
        maker = makers.get(step.inputs[1]) if step.op in ("Conv", "Gemm", "MatMul") else None
        if maker is None or known[maker.inputs[0]].array.ndim < 2:
            result.append(step)
            continue
        turned = step.op == "MatMul" or (step.op == "Gemm" and not step.get("transB", 0))
        integers = known[maker.inputs[0]].array
        if step.op == "MatMul" and integers.ndim != 2:
            result.append(step)
            continue
        grid = _grid(maker, known, integers, axis=1 if turned else 0)
        if grid is None:
            result.append(step)
            continue
        low, high = maker.get("range")
        moved = integers.astype(np.int64).T if turned else integers.astype(np.int64)
        scale, zero = grid
        if low == 0:
            half = (high + 1) // 2
            moved, zero, low, high = moved - half, zero - half, -half, high - half
        stem = f"{step.name}\0weight"
        names = (stem, f"{stem}_scale", f"{stem}_zero_point")
        arrays: tuple[np.ndarray[Any, Any], ...] = (
            np.ascontiguousarray(moved.astype(np.int8)),
            scale.astype(np.float32),
            zero.astype(np.int64),
        )
        known.update({name: Known(array) for name, array in zip(names, arrays, strict=True)})
        made = f"{stem}_dequantized"
        result.append(
            Step(WEIGHT, step.name, names, (made,), {"range": (low, high)}, step.opset, step.fixed_batch)
        )
        inputs = (step.inputs[0], made, *step.inputs[2:])
        if step.op == "MatMul":
            result.append(replace(step, op="Linear", inputs=inputs))
        else:
            extra = {"transB": 1} if step.op == "Gemm" else {}
            result.append(replace(step, inputs=inputs, attributes={**step.attributes, **extra}))
    read = Counter(name for step in result for name in step.inputs)
    return [
        step for step in result if id(step) not in {id(m) for m in makers.values()} or read[step.outputs[0]]
    ]


def _grid(
    step: Step, known: dict[str, Known], integers: np.ndarray[Any, Any], axis: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None:
    """Scale and zero point of each channel along an axis; None where the file has them along another."""
    scale = known[step.inputs[1]].array if step.inputs[1] in known else None
    if scale is None or step.get("block_size", 0):
        return None
    given = known.get(step.inputs[2]) if len(step.inputs) > 2 else None
    zero = np.zeros(scale.shape, np.int64) if given is None else given.array.astype(np.int64)
    channels = integers.shape[axis]
    if scale.size == 1:
        return np.full(channels, scale.reshape(-1)[0]), np.full(channels, zero.reshape(-1)[0])
    if step.get("axis", 1) % integers.ndim != axis or scale.shape != (channels,):
        return None
    return scale, zero


def _parameters(
    step: Step, scale: Value, zero: Value
) -> tuple[list[float], list[int], int, int, torch.dtype]:
    scales = step.known(scale, "the scale")
    zeros = [0] * len(scales) if zero is None else [int(each) for each in step.known(zero, "the zero point")]
    if step.get("range") is None:
        raise step.refuse(f"it quantizes to {step.get('kind')}; expected 8 bits or fewer")
    if step.get("block_size", 0):
        raise step.refuse("it quantizes by blocks; expected one scale for a tensor or one for a channel")
    low, high = step.get("range")
    return scales, zeros, low, high, torch.int8 if low < 0 else torch.uint8


def unrounded(step: Step, given: list[Value]) -> tuple[Tensor, Tensor]:
    """What a quantize step rounds, clipped to its range, in the units of its input and float64; and half of its step."""
    tensor = to_tensor(given[0]).double()
    scales, zeros, low, high, _ = _parameters(step, given[1], given[2] if len(given) > 2 else None)
    shape = [1] * tensor.ndim
    if len(scales) > 1:
        shape[_axis(step, tensor)] = -1
    scale, zero = (torch.tensor(each, dtype=torch.float64).reshape(shape) for each in (scales, zeros))
    return ((tensor / scale + zero).clamp(low, high) - zero) * scale, _HALF * scale


def _axis(step: Step, x: Tensor) -> int:
    return int(step.get("axis", 1)) % x.ndim


@implements("QuantizeLinear")
def _quantize(step: Step, x: Value, scale: Value, zero: Value = None) -> Tensor:
    tensor = to_tensor(x)
    scales, zeros, *rest = _parameters(step, scale, zero)
    result: Tensor
    if len(scales) == 1:
        result = _OPERATIONS.quantize_per_tensor(tensor, scales[0], zeros[0], *rest)
        return result
    grid = (to_tensor(scale), torch.tensor(zeros))
    result = _OPERATIONS.quantize_per_channel(tensor, *grid, _axis(step, tensor), *rest)
    return result


@implements("DequantizeLinear")
def _dequantize(step: Step, x: Value, scale: Value, zero: Value = None) -> Tensor:
    tensor = to_tensor(x)
    result: Tensor
    if step.get("range") is None and isinstance(x, Known):
        # The int32 of a bias, by which nothing is multiplied: a float in the graph.
        factor, offset = to_tensor(scale), 0 if zero is None else to_tensor(zero)
        if factor.numel() > 1:
            shape = [-1 if axis == _axis(step, tensor) else 1 for axis in range(tensor.ndim)]
            factor = factor.reshape(shape)
            offset = offset.reshape(shape) if isinstance(offset, Tensor) else offset
        result = (tensor - offset).to(factor.dtype) * factor
        return result
    scales, zeros, *rest = _parameters(step, scale, zero)
    if len(scales) == 1:
        result = _OPERATIONS.dequantize_per_tensor(tensor, scales[0], zeros[0], *rest)
        return result
    grid = (to_tensor(scale), torch.tensor(zeros))
    result = _OPERATIONS.dequantize_per_channel(tensor, *grid, _axis(step, tensor), *rest)
    return result


@implements(WEIGHT)
def _weight(step: Step, integers: Value, scale: Value, zero: Value) -> Tensor:
    values = [to_tensor(each) for each in (integers, scale, zero)]
    result: Tensor = _OPERATIONS.dequantize_per_channel(*values, 0, *step.get("range"), torch.int8)
    return result


def _refused(step: Step, *values: Value) -> Tensor:
    raise step.refuse(
        "the file computes with integer operators; give one in QDQ format (ONNX Runtime: QuantFormat.QDQ), or correct it "
        "as it is with correct_onnx"
    )


OPERATORS.update(
    dict.fromkeys(
        ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"), _refused
    )
)
