"""Grids of a layer's rows, a column at a time: what rounding column by column reads of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cat_plugin.ptq.quantizers.neighbours import LIMIT

__all__ = ["SMALL_BLOCK", "beside_", "by_column", "columns_first", "times"]

SMALL_BLOCK = 8
"""Columns that change one another one by one; what they change beyond goes through one matrix product."""


def beside_(q: Tensor, others: Sequence[Tensor]) -> Tensor:
    """`q` clamped in place to what may stand beside the integers of its neighbours, which keep to their bound themselves."""
    least, most = -LIMIT - others[0].clamp(max=0), LIMIT - others[0].clamp(min=0)
    for other in others[1:]:
        least, most = least - other.clamp(max=0), most - other.clamp(min=0)
    return q.clamp_(least, most)


def columns_first(values: Tensor) -> Tensor:
    """(G, C, R) of (G, R, C) values, in which a column lies in one piece: a copy unless all columns are one."""
    turned = values.transpose(1, 2)
    return turned if values.stride(2) == 0 and values.stride(1) == 1 else turned.contiguous()


def by_column(values: Tensor, k: int, order: Tensor | None = None) -> Tensor:
    """(G, R, K) view or copy of a grid's (G, R, Q) values for each of K columns, in (G, K) order; Q groups divide K."""
    groups = values.shape[2]
    if groups == 1:
        return values.expand(-1, -1, k)
    spread = values.repeat_interleave(k // groups, 2)
    return spread if order is None else spread.gather(2, order.unsqueeze(1).expand_as(spread))


def times(values: Tensor, modulation: Tensor | None) -> Tensor:
    """Values multiplied by what modulates them, if anything does."""
    return values if modulation is None else values * modulation
