"""Linear layers on more than two axes as one product of matrices, whatever the order of the input's axes in memory.

Torch expands the weight to every image where the input is transposed; that would hide from the passes that it is one
quantized weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["rewrites"]

aten = torch.ops.aten


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """``x weight' + bias`` over the last axis; all other axes are rows."""
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    product = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
    return product if x.ndim == 2 else product.view(*x.shape[:-1], weight.shape[0])


def rewrites() -> dict[Any, Callable[..., Any]]:
    """Rewrites of linear layers."""
    return {aten.linear.default: _linear}
