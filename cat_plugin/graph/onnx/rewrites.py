"""What is rewritten before it is converted: operations, or arguments of them, that ONNX's operators do not know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from cat_plugin.graph.rewrites import elementwise, indexing
from cat_plugin.graph.rewrites.pooling import adaptive_average, pad_constant

__all__ = ["table"]

aten = torch.ops.aten


def _index(x: Any, indices: Any) -> Any:
    """One tensor of integers is what ONNX's Gather takes."""
    given = [index for index in indices if index is not None]
    one = len(given) == 1 and given[0].dtype is not torch.bool
    return NotImplemented if one else indexing.index(x, indices)


def _pad(x: Any, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    return pad_constant(x, pad, 0 if value is None else value) if mode == "constant" else NotImplemented


def _slice_scatter(
    x: Any, source: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Any:
    """Every so many values: read from both, side by side, at places that are known."""
    size = x.shape[dim]
    if step == 1 or not all(isinstance(each, int) for each in (size, start or 0, 0 if end is None else end)):
        return NotImplemented
    first, stop, _ = slice(start, end, step).indices(size)
    place = torch.arange(size, device=x.device)
    number = torch.div(place - first, step, rounding_mode="floor")
    written = torch.logical_and(
        (place - first) == number * step, torch.logical_and(place >= first, place < stop)
    )
    joined = torch.cat([x, source.to(x.dtype)], dim)
    return indexing.along(joined, dim, torch.where(written, number + size, place))


def table() -> dict[Any, Callable[..., Any]]:
    """What ``ExportedProgram.run_decompositions`` is given."""
    return {
        **elementwise.rewrites(),
        **indexing.rewrites(),
        aten.softplus.default: elementwise.softplus,
        aten.index.Tensor: _index,
        aten.adaptive_avg_pool1d.default: adaptive_average,
        aten.adaptive_avg_pool2d.default: adaptive_average,
        aten.pad.default: _pad,
        aten.constant_pad_nd.default: pad_constant,
        aten.slice_scatter.default: _slice_scatter,
    }
