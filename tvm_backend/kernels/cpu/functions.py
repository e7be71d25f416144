"""Functions of float32 vectors that processors have no instruction for, from additions and products that every set has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tvm_backend.kernels import tir
from tvm_backend.kernels.cpu import ir
from tvm_backend.kernels.cpu.epilogue import pieces
from tvm_backend.kernels.tir import Expr

__all__ = ["SHIFT", "SHIFT_BITS", "TAIL", "TAIL_STEP", "TANH", "exp", "folded", "normal_tail", "total"]

SHIFT = 1.5 * 2**23
"""A float32 of this size has no digits behind the point: adding it rounds, and leaves the integer in the lowest bits."""

SHIFT_BITS = 0x4B400000
"""Its bits."""

TAIL = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
"""Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: coefficients of powers of ``1 / (1 + TAIL_STEP z)``."""

TAIL_STEP = 0.3275911

TANH = (math.sqrt(2 / math.pi), 0.044715)
"""Of GELU's approximation by tanh: the factor and the cube's."""


def _constant(value: float, lanes: int) -> Expr:
    return tir.constant(value, "float32", lanes)


def exp(value: Expr, lanes: int) -> Expr:
    """``e ** value``, relative error below ``2**-21``, for values up to 88; 0 below -87; NaN stays NaN.

    ``e ** x = 2 ** n e ** f`` with ``n`` the nearest integer to ``x / log 2`` and a polynomial of degree 7 for ``|f| < 0.35``.
    """
    given = ir.hold(value, "float32", lanes)
    x = tir.smaller(tir.larger(given, _constant(-87.0, lanes)), _constant(88.0, lanes))
    x = ir.hold(x, "float32", lanes)
    shifted = ir.hold(
        ir.fence(x * _constant(1 / math.log(2), lanes), lanes) + _constant(SHIFT, lanes), "float32", lanes
    )
    n = ir.hold(shifted - _constant(SHIFT, lanes), "float32", lanes)
    # log 2 in two parts, the first of so few digits that its product with n is exact.
    high = 0.693359375
    f = ir.hold((x - n * _constant(high, lanes)) - n * _constant(math.log(2) - high, lanes), "float32", lanes)
    result = _constant(1 / math.factorial(7), lanes)
    for i in range(6, -1, -1):
        result = result * f + _constant(1 / math.factorial(i), lanes)
    bits = tir.reinterpret(tir.vector("int32", lanes), shifted) + tir.constant(127, "int32", lanes)
    power = tir.reinterpret(tir.vector("float32", lanes), bits << tir.constant(23, "int32", lanes))
    result = tir.select(given < _constant(-87.0, lanes), _constant(0.0, lanes), result * power)
    return tir.select(tir.is_nan(given), given, result)


def normal_tail(value: Expr, lanes: int) -> Expr:
    """Half the complementary error function of ``value / sqrt(2)``, for values of 0 or more; error below ``2**-22``."""
    z = ir.hold(value * _constant(math.sqrt(0.5), lanes), "float32", lanes)
    t = _constant(1.0, lanes) / (_constant(1.0, lanes) + _constant(TAIL_STEP, lanes) * z)
    t = ir.hold(t, "float32", lanes)
    result = _constant(0.5 * TAIL[-1], lanes)
    for coefficient in TAIL[-2::-1]:
        result = result * t + _constant(0.5 * coefficient, lanes)
    return result * t * exp(_constant(0.0, lanes) - z * z, lanes)


def total(value: Expr, lanes: int, join: str = "add") -> Expr:
    """The sum, or the largest, of the lanes of a vector, by halves."""
    while lanes > 1:
        lanes //= 2
        held = ir.hold(value, "float32", 2 * lanes)
        low, high = ir.part(held, 0, lanes), ir.part(held, lanes, lanes)
        value = low + high if join == "add" else tir.larger(low, high)
    return value


def folded(
    count: int, lanes: int, values: Callable[[Expr, int], Sequence[Expr]], joins: Sequence[str]
) -> list[Expr]:
    """Each of ``values(start, lanes)`` over `count` numbers, joined to one: ``"add"`` for the sum, ``"max"`` for the largest."""

    def join(how: str, one: Expr, other: Expr) -> Expr:
        return one + other if how == "add" else tir.larger(one, other)

    result: list[Expr] = []
    for begin, repeat, width in pieces(count, lanes):
        held = ir.Registers(len(joins), "float32", width)
        for slot, how in enumerate(joins):
            held[slot] = tir.constant(0.0 if how == "add" else -math.inf, "float32", width)
        with tir.loop(repeat) as index:
            for slot, new in enumerate(values(begin + index * width, width)):
                held[slot] = join(joins[slot], held[slot], new)
        ends = [ir.hold(total(held[slot], width, how), "float32", 1) for slot, how in enumerate(joins)]
        if result:
            ends = [
                ir.hold(join(how, one, other), "float32", 1)
                for how, one, other in zip(joins, result, ends, strict=True)
            ]
        result = ends
    return result
