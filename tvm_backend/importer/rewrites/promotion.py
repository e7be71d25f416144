"""Operands of the type that torch computes in: TVM turns a scalar into the other operand's type, so that 0.5 beside integers becomes 0.

Sums and products of whole numbers along a dimension have 64 bits, functions of them are real.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cat_plugin.graph.rewrites.indexing import sum_dtype

__all__ = ["common_dtype", "rewrites"]

aten = torch.ops.aten

_ARITHMETIC = (
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.remainder.Tensor, aten.fmod.Tensor, aten.maximum.default,
    aten.minimum.default, aten.pow.Tensor_Tensor, aten.pow.Tensor_Scalar, aten.pow.Scalar, aten.remainder.Scalar,
    aten.fmod.Scalar, aten.add.Scalar, aten.sub.Scalar, aten.mul.Scalar,
)  # fmt: skip
_DIVISIONS = (aten.div.Tensor, aten.div.Scalar, aten.atan2.default)
_COMPARISONS = tuple(
    getattr(getattr(aten, name), kind)
    for name in ("eq", "ne", "lt", "le", "gt", "ge")
    for kind in ("Tensor", "Scalar")
)


_LOGICAL = {
    aten.add.Tensor: torch.logical_or,
    aten.maximum.default: torch.logical_or,
    aten.minimum.default: torch.logical_and,
    aten.mul.Tensor: torch.logical_and,
}
_SUMS = (aten.cumsum.default, aten.prod.default, aten.prod.dim_int)
_FUNCTIONS = tuple(
    getattr(aten, name).default
    for name in (
        "acos", "acosh", "asin", "asinh", "atan", "atanh", "cos", "cosh", "erf", "exp", "expm1", "log", "log10", "log1p", "log2",
        "reciprocal", "rsqrt", "sigmoid", "sin", "sinh", "sqrt", "tan", "tanh",
    )
)  # fmt: skip


def common_dtype(left: Any, right: Any, divides: bool = False) -> torch.dtype:
    """The type in which torch computes `left` (an operator) `right`."""
    dtype = torch.result_type(left, right)
    whole = not dtype.is_floating_point and not dtype.is_complex
    return torch.get_default_dtype() if divides and whole else dtype


def _converted(value: Any, dtype: torch.dtype, other: Any) -> Any:
    """An operand in a type; a size that is no number, as a tensor, since TVM's operators take no other."""
    if isinstance(value, torch.SymInt) and isinstance(other, torch.Tensor):
        return aten.arange.start(value, value + 1, dtype=dtype, device=other.device).reshape([])
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.dtype != dtype else value


def _of_truths(operator: Any, left: Any, right: Any) -> Any:
    """The same of truth values, of which TVM's arithmetic and comparisons know nothing."""
    if operator in _COMPARISONS:
        return operator(
            *(v.to(torch.int32) if isinstance(v, torch.Tensor) else int(v) for v in (left, right))
        )
    both = isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)
    return _LOGICAL[operator](left, right) if both and operator in _LOGICAL else NotImplemented


def _promoting(operator: Any, divides: bool) -> Callable[..., Any]:
    def rewrite(left: Any, right: Any, **options: Any) -> Any:
        dtype = common_dtype(left, right, divides)
        if dtype == torch.bool:
            return _of_truths(operator, left, right)
        new = _converted(left, dtype, right), _converted(right, dtype, left)
        if new[0] is left and new[1] is right:
            return NotImplemented
        of_sizes = isinstance(left, torch.SymInt) or isinstance(right, torch.SymInt)
        return (getattr(operator.overloadpacket, "Tensor", operator) if of_sizes else operator)(
            *new, **options
        )

    return rewrite


def _division_with_mode(left: Any, right: Any, *, rounding_mode: str | None) -> Any:
    """A quotient as the quotient and its rounding, which TVM computes in integers only for integers."""
    if rounding_mode is None:
        return aten.div.Tensor(left, right)
    dtype = common_dtype(left, right)
    if not dtype.is_floating_point:
        if isinstance(right, torch.Tensor) and rounding_mode == "floor" and left.dtype == right.dtype:
            return NotImplemented
        right = right.to(dtype) if isinstance(right, torch.Tensor) else torch.full((), right, dtype=dtype)
        left = _converted(left, dtype, right)
        if rounding_mode == "floor":
            return torch.div(left, right, rounding_mode="floor")
        whole = torch.div(torch.abs(left), torch.abs(right), rounding_mode="floor")
        return whole * (torch.sign(left) * torch.sign(right))
    quotient = torch.div(_converted(left, dtype, right), _converted(right, dtype, left))
    return torch.floor(quotient) if rounding_mode == "floor" else torch.trunc(quotient)


def _summing(operator: Any) -> Callable[..., Any]:
    def rewrite(x: Any, *options: Any, dtype: Any = None, **named: Any) -> Any:
        wanted = sum_dtype(x, dtype)
        return NotImplemented if x.dtype == wanted else operator(x.to(wanted), *options, **named)

    return rewrite


def _real(operator: Any) -> Callable[..., Any]:
    def rewrite(x: Any) -> Any:
        return (
            NotImplemented
            if x.is_floating_point() or x.is_complex()
            else operator(x.to(torch.get_default_dtype()))
        )

    return rewrite


def _where(condition: Any, left: Any, right: Any) -> Any:
    dtype = torch.result_type(left, right)
    if left.dtype == right.dtype == dtype:
        return NotImplemented
    return torch.where(condition, left.to(dtype), right.to(dtype))


def rewrites() -> dict[Any, Callable[..., Any]]:
    """Rewrites of operators whose result has another type than an operand."""
    found = {operator: _promoting(operator, False) for operator in (*_ARITHMETIC, *_COMPARISONS)}
    found.update({operator: _promoting(operator, True) for operator in _DIVISIONS})
    found.update({operator: _summing(operator) for operator in _SUMS})
    found.update({operator: _real(operator) for operator in _FUNCTIONS})
    found[aten.div.Tensor_mode] = _division_with_mode
    found[aten.where.self] = _where
    return found
