"""Elementwise operators whose converters drop an argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from cat_plugin.graph.rewrites import elementwise
from tvm_backend.importer.rewrites import promotion

__all__ = ["rewrites"]

aten = torch.ops.aten


def _scaled(operator: Any) -> Callable[..., Any]:
    """``add`` and ``sub`` without their ``alpha``."""
    promote = promotion.rewrites()[operator]

    def rewrite(left: Any, right: Any, *, alpha: Any = 1) -> Any:
        return promote(left, right) if alpha == 1 else operator(left, right * alpha)

    return rewrite


def _scaled_by_position(operator: Any) -> Callable[..., Any]:
    promote = promotion.rewrites()[operator]

    def rewrite(left: Any, right: Any, alpha: Any = 1) -> Any:
        return promote(left, right) if alpha == 1 else operator(left, right * alpha)

    return rewrite


def _elu(x: Any, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Any:
    """ELU, SELU and CELU: ``scale * (max(0, x) + alpha * (exp(input_scale * min(0, x)) - 1))``."""
    if scale == 1 and input_scale == 1 and alpha >= 0:
        return NotImplemented
    negative = torch.expm1(torch.clamp(x, max=0) * input_scale) * (alpha * scale)
    return torch.relu(x) * scale + negative


def _rrelu(
    x: Any, lower: float = 0.125, upper: float = 1 / 3, training: bool = False, generator: Any = None
) -> Any:
    return NotImplemented if training else torch.nn.functional.leaky_relu(x, (lower + upper) / 2)


def _copy(self: Any, source: Any, non_blocking: bool = False) -> Any:
    """The converter makes every later reader of `self` read `source`."""
    return source.to(self.dtype).expand(self.shape).clone()


def _clamp(x: Any, min: Any = None, max: Any = None) -> Any:
    """Integers within bounds of which one may be missing, which the converter takes for an infinite one."""
    if x.dtype.is_floating_point:
        return NotImplemented
    for bound, operator in ((min, torch.maximum), (max, torch.minimum)):
        if bound is not None:
            kind = torch.result_type(x, bound)
            if not isinstance(bound, torch.Tensor):
                bound = torch.full([], bound, dtype=kind, device=x.device)
            x = operator(x.to(kind), bound.to(kind))
    return x


def _times(x: Any, other: Any) -> Any:
    return torch.mul(x.to(torch.result_type(x, other)), other)


def _isfinite(x: Any) -> Any:
    return torch.abs(x) < math.inf


def _hardswish(x: Any) -> Any:
    return x * torch.clamp(x + 3, 0, 6) * (1 / 6)


def _hardsigmoid(x: Any) -> Any:
    return torch.clamp(x + 3, 0, 6) * (1 / 6)


def _full(size: Any, fill_value: Any, **kind: Any) -> Any:
    """TVM cannot build its own of a value that is not finite."""
    if isinstance(fill_value, float) and not math.isfinite(fill_value):
        return aten.scalar_tensor(fill_value, dtype=kind.get("dtype"), device=kind.get("device")).expand(size)
    return NotImplemented


def _full_like(x: Any, fill_value: Any, *, dtype: Any = None, **_: Any) -> Any:
    return _full(x.shape, fill_value, dtype=x.dtype if dtype is None else dtype, device=x.device)


def rewrites() -> dict[Any, Callable[..., Any]]:
    """Rewrites of elementwise operators."""
    return {
        **elementwise.rewrites(),
        aten.add.Tensor: _scaled(aten.add.Tensor),
        aten.sub.Tensor: _scaled(aten.sub.Tensor),
        aten.add.Scalar: _scaled_by_position(aten.add.Scalar),
        aten.sub.Scalar: _scaled_by_position(aten.sub.Scalar),
        aten.mul.Scalar: _times,
        aten.elu.default: _elu,
        aten.rrelu.default: _rrelu,
        aten.clamp.default: _clamp,
        aten.clamp.Tensor: _clamp,
        aten.copy.default: _copy,
        aten.isfinite.default: _isfinite,
        aten.full.default: _full,
        aten.full_like.default: _full_like,
        aten.hardswish.default: _hardswish,
        aten.hardsigmoid.default: _hardsigmoid,
    }
