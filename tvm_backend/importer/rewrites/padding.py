"""Padding: with a constant as TVM has it, in every other mode by the indices of what is repeated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from cat_plugin.graph.rewrites.indexing import along
from cat_plugin.graph.rewrites.pooling import pad_constant

__all__ = ["rewrites"]

aten = torch.ops.aten


def _places(size: int, before: int, after: int, mode: str, device: Any) -> Any:
    """Where each element of a padded dimension comes from."""
    places = torch.arange(-before, size + after, device=device)
    if mode == "circular":
        return torch.remainder(places, size)
    if mode == "replicate":
        return torch.clamp(places, 0, size - 1)
    return (size - 1) - torch.abs((size - 1) - torch.abs(places))


def _pad(x: Any, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    if mode == "constant":
        return aten.constant_pad_nd(x, list(pad), 0 if value is None else value)
    for i in range(len(pad) // 2):
        dim, before, after = x.dim() - 1 - i, pad[2 * i], pad[2 * i + 1]
        if before or after:
            x = along(x, dim, _places(x.shape[dim], before, after, mode, x.device))
    return x


def _of_mode(mode: str) -> Callable[..., Any]:
    def rewrite(x: Any, padding: Sequence[int]) -> Any:
        return _pad(x, padding, mode)

    return rewrite


def rewrites() -> dict[Any, Callable[..., Any]]:
    """Rewrites of padding."""
    found: dict[Any, Callable[..., Any]] = {
        aten.pad.default: _pad,
        aten.constant_pad_nd.default: pad_constant,
        aten._pad_circular.default: _of_mode("circular"),  # noqa: SLF001
    }
    for rank in (1, 2, 3):
        found[getattr(aten, f"reflection_pad{rank}d").default] = _of_mode("reflect")
        found[getattr(aten, f"replication_pad{rank}d").default] = _of_mode("replicate")
    return found
