"""Functions of what is left in float, written so that vectors compute them: the C library's take one number at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tvm
from tvm import relax, te, tirx, topi

from tvm_backend import compat
from tvm_backend.kernels.cpu.functions import SHIFT, TAIL, TAIL_STEP, TANH

__all__ = ["FUNCTIONS", "exp", "held"]

_HIGH = 0.693359375
"""The first digits of log 2, so few that products with small integers are exact."""


def _const(value: float) -> Any:
    return tirx.const(value, "float32")


def held(name: str, value: Any, then: Callable[[Any], Any]) -> Any:
    """``then(value)``, the value computed once."""
    variable = tirx.Var(name, "float32")
    return tirx.Let(variable, value, then(variable))


def exp(value: Any) -> Any:
    """``e ** value``, relative error below ``2**-21``; 0 below -87, NaN stays NaN.

    ``e ** x = 2 ** n e ** f`` with ``n`` the nearest integer to ``x / log 2`` and a polynomial of degree 7 for ``|f| < 0.35``.
    """

    def polynomial(f: Any) -> Any:
        result = _const(1 / math.factorial(7))
        for i in range(6, -1, -1):
            result = result * f + _const(1 / math.factorial(i))
        return result

    def scaled(x: Any, shifted: Any, f: Any) -> Any:
        # Half of the power, as twice the largest one that float32 holds may be asked for.
        bits = (tirx.reinterpret("int32", shifted) + tirx.const(126, "int32")) << tirx.const(23, "int32")
        result = polynomial(f) * tirx.reinterpret("float32", bits) * _const(2.0)
        result = tirx.Select(x > _const(89.0), _const(math.inf), result)
        return tirx.Select(x < _const(-87.0), _const(0.0), result)

    def reduced(x: Any, shifted: Any) -> Any:
        def rest(n: Any) -> Any:
            f = (x - n * _const(_HIGH)) - n * _const(math.log(2) - _HIGH)
            return held("f", f, lambda f: scaled(x, shifted, f))

        return held("n", shifted - _const(SHIFT), rest)

    return held(
        "x",
        value,
        lambda x: held("s", x * _const(1 / math.log(2)) + _const(SHIFT), lambda s: reduced(x, s)),
    )


def _sigmoid(value: Any) -> Any:
    return _const(1.0) / (_const(1.0) + exp(_const(0.0) - value))


def _tanh(value: Any) -> Any:
    return _const(1.0) - _const(2.0) / (_const(1.0) + exp(_const(2.0) * value))


def _gelu(value: Any) -> Any:
    """``x P(X < x)`` of a normal X, whose tail is :func:`tvm_backend.kernels.cpu.functions.normal_tail`."""

    def tail(z: Any, t: Any) -> Any:
        result = _const(0.5 * TAIL[-1])
        for coefficient in TAIL[-2::-1]:
            result = result * t + _const(0.5 * coefficient)
        return result * t * exp(_const(0.0) - z * z)

    def part(x: Any, z: Any) -> Any:
        below = held("t", _const(1.0) / (_const(1.0) + _const(TAIL_STEP) * z), lambda t: tail(z, t))
        return held("p", below, lambda p: x * tirx.Select(x < _const(0.0), p, _const(1.0) - p))

    return held(
        "x",
        value,
        lambda x: held("z", tirx.max(x, _const(0.0) - x) * _const(math.sqrt(0.5)), lambda z: part(x, z)),
    )


def _gelu_tanh(value: Any) -> Any:
    factor, cube = (_const(number) for number in TANH)

    def product(x: Any) -> Any:
        inner = factor * (x + cube * (x * x * x))
        return x / (_const(1.0) + exp(_const(-2.0) * inner))

    return held("x", value, product)


def _each(name: str, function: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """The rule for a function of each number; what is not float32 is left to TVM's."""
    short = name.removeprefix("nn.")

    def rule(builder: relax.BlockBuilder, call: relax.Call) -> Any:
        (x,) = call.args
        if str(compat.type_of(x).dtype) != "float32":
            return _TVMS[name](builder, call)

        def compute(tensor: Any) -> Any:
            return te.compute(tensor.shape, lambda *at: function(tensor(*at)), name=short)

        return builder.call_te(compute, x, primfunc_name_hint=short)

    return rule


def _softmax(builder: relax.BlockBuilder, call: relax.Call) -> Any:
    """Powers of the differences to the largest number, divided by their sum, along any axis."""
    (x,) = call.args
    if str(compat.type_of(x).dtype) != "float32":
        return _TVMS["nn.softmax"](builder, call)

    def compute(tensor: Any) -> Any:
        axis = int(call.attrs.axis) % len(tensor.shape)
        largest = topi.max(tensor, axis=axis, keepdims=True)
        powers = te.compute(
            tensor.shape,
            lambda *at: exp(tensor(*at) - largest(*at[:axis], 0, *at[axis + 1 :])),
            name="powers",
        )
        sums = topi.sum(powers, axis=axis, keepdims=True)
        return te.compute(
            tensor.shape, lambda *at: powers(*at) / sums(*at[:axis], 0, *at[axis + 1 :]), name="softmax"
        )

    return builder.call_te(compute, x, primfunc_name_hint="softmax")


_TVMS: dict[str, Any] = {
    name: tvm.ir.Op.get(f"relax.{name}").get_attr("FLegalize")
    for name in ("exp", "nn.gelu", "nn.gelu_tanh", "nn.softmax", "sigmoid", "tanh")
}

FUNCTIONS: dict[str, Any] = {
    "relax.exp": _each("exp", exp),
    "relax.nn.gelu": _each("nn.gelu", _gelu),
    "relax.nn.gelu_tanh": _each("nn.gelu_tanh", _gelu_tanh),
    "relax.nn.softmax": _softmax,
    "relax.sigmoid": _each("sigmoid", _sigmoid),
    "relax.tanh": _each("tanh", _tanh),
}
"""Rules for ``LegalizeOps``."""
