"""ONNX operators that work value by value, in torch."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cat_plugin.graph.onnx.operators import (
    OPERATORS,
    Known,
    Step,
    Value,
    implements,
    number_or_tensor,
    to_tensor,
)

__all__: list[str] = []

_DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip


def _unary(function: Any) -> Any:
    return lambda step, x: function(to_tensor(x))


for _op, _function in {
    "Relu": F.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "Exp": torch.exp, "Log": torch.log,
    "Sqrt": torch.sqrt, "Abs": torch.abs, "Neg": torch.neg, "Erf": torch.erf, "Floor": torch.floor,
    "Ceil": torch.ceil, "Round": torch.round, "Sin": torch.sin, "Cos": torch.cos, "Reciprocal": torch.reciprocal,
    "Sign": torch.sign, "Softplus": F.softplus, "Softsign": F.softsign, "HardSwish": F.hardswish, "Mish": F.mish,
    "Not": torch.logical_not, "IsNaN": torch.isnan, "Identity": lambda x: x,
}.items():  # fmt: skip
    OPERATORS[_op] = _unary(_function)


def _binary(function: Any) -> Any:
    def run(step: Step, a: Value, b: Value) -> Any:
        first, second = number_or_tensor(a, b), number_or_tensor(b, a)
        return function(first, second)

    return run


def _quotient(a: Any, b: Any) -> Any:
    whole = not any(isinstance(x, float) or (isinstance(x, Tensor) and x.is_floating_point()) for x in (a, b))
    if whole:
        return torch.div(a, b, rounding_mode="trunc")
    return a / b


for _op, _function in {
    "Add": lambda a, b: a + b, "Sub": lambda a, b: a - b, "Mul": lambda a, b: a * b, "Div": _quotient,
    "Equal": lambda a, b: a == b, "Greater": lambda a, b: a > b, "Less": lambda a, b: a < b,
    "GreaterOrEqual": lambda a, b: a >= b, "LessOrEqual": lambda a, b: a <= b, "And": lambda a, b: a & b,
    "Or": lambda a, b: a | b, "Xor": lambda a, b: a ^ b,
}.items():  # fmt: skip
    OPERATORS[_op] = _binary(_function)


@implements("Pow")
def _pow(step: Step, x: Value, exponent: Value) -> Tensor:
    power = number_or_tensor(exponent, x)
    if isinstance(power, Tensor) and isinstance(exponent, Known) and exponent.array.size == 1:
        power = exponent.numbers()[0]
    if power == 2 and isinstance(x, Tensor):
        return x * x
    result: Tensor = torch.pow(to_tensor(x), power)
    return result


@implements("Max", "Min", "Sum", "Mean")
def _variadic(step: Step, *values: Value) -> Tensor:
    pick = {"Max": torch.maximum, "Min": torch.minimum}.get(step.op, torch.add)
    limit = {"Max": "min", "Min": "max"}.get(step.op)
    tensors = [value for value in values if isinstance(value, Tensor)]
    if limit is not None and len(values) == 2 and len(tensors) == 1:
        other = next(value for value in values if not isinstance(value, Tensor))
        edge = number_or_tensor(other, tensors[0])
        if not isinstance(edge, Tensor):
            return torch.clamp(tensors[0], **{limit: edge})
    result: Tensor = reduce(pick, [to_tensor(value) for value in values])
    return result / len(values) if step.op == "Mean" else result


@implements("Where")
def _where(step: Step, condition: Value, a: Value, b: Value) -> Tensor:
    return torch.where(to_tensor(condition), to_tensor(a), to_tensor(b))


@implements("Clip")
def _clip(step: Step, x: Value, low: Value = None, high: Value = None) -> Tensor:
    edges = []
    for name, given in (("min", low), ("max", high)):
        if given is not None and not isinstance(given, Known):
            raise step.refuse(f"{name} is computed from the data; expected a constant")
        edges.append(given.numbers()[0] if given is not None else step.get(name))
    x = to_tensor(x)
    if edges == [0, 6]:
        return F.relu6(x)
    if edges[0] == 0 and (edges[1] is None or edges[1] == math.inf or edges[1] > 3e38):
        return F.relu(x)
    return x if edges == [None, None] else torch.clamp(x, *edges)


@implements("Cast", "CastLike")
def _cast(step: Step, x: Value, like: Value = None) -> Tensor:
    if step.op == "CastLike":
        return to_tensor(x).to(to_tensor(like).dtype)
    to = step.get("to")
    if to not in _DTYPES:
        raise step.refuse(f"a cast to type {to}; expected a type that torch computes with")
    tensor = to_tensor(x)
    return tensor if tensor.dtype is _DTYPES[to] else tensor.to(_DTYPES[to])


@implements("LeakyRelu")
def _leaky(step: Step, x: Value) -> Tensor:
    return F.leaky_relu(to_tensor(x), step.get("alpha", 0.01))


@implements("Elu", "Celu")
def _elu(step: Step, x: Value) -> Tensor:
    function = F.elu if step.op == "Elu" else F.celu
    return function(to_tensor(x), step.get("alpha", 1.0))


@implements("Selu")
def _selu(step: Step, x: Value) -> Tensor:
    alpha, gamma = step.get("alpha", 1.6732632423543772), step.get("gamma", 1.0507009873554805)
    if abs(alpha - 1.6732632423543772) < 1e-6 and abs(gamma - 1.0507009873554805) < 1e-6:
        return F.selu(to_tensor(x))
    scaled: Tensor = gamma * F.elu(to_tensor(x), alpha)
    return scaled


@implements("HardSigmoid")
def _hard_sigmoid(step: Step, x: Value) -> Tensor:
    alpha, beta = step.get("alpha", 0.2), step.get("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return F.hardsigmoid(to_tensor(x))
    return torch.clamp(to_tensor(x) * alpha + beta, 0.0, 1.0)


@implements("Gelu")
def _gelu(step: Step, x: Value) -> Tensor:
    return F.gelu(to_tensor(x), approximate=step.get("approximate", "none"))


@implements("ThresholdedRelu")
def _thresholded(step: Step, x: Value) -> Tensor:
    return F.threshold(to_tensor(x), step.get("alpha", 1.0), 0.0)


@implements("PRelu")
def _prelu(step: Step, x: Value, slope: Value) -> Tensor:
    tensor, by = to_tensor(x), to_tensor(slope)
    return torch.where(tensor < 0, tensor * by, tensor)


@implements("Dropout")
def _dropout(step: Step, x: Value, *rest: Value) -> Tensor:
    return to_tensor(x)
