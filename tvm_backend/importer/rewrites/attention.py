"""Scaled dot-product attention as two products and a softmax, without torch's guard where no row can be masked whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["rewrites"]

aten = torch.ops.aten


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """``softmax(query key' scale + mask) value``; a row that is masked whole gives zeros, as in torch."""
    if dropout_p:
        return NotImplemented
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (
            t.unsqueeze(-3)
            .expand([*t.shape[:-2], groups, *t.shape[-2:]])
            .reshape([*t.shape[:-3], t.shape[-3] * groups, *t.shape[-2:]])
            for t in (key, value)
        )
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = torch.matmul(query, key.transpose(-2, -1)) * factor
    if is_causal:
        rows = torch.arange(query.shape[-2], device=query.device).unsqueeze(1)
        columns = torch.arange(key.shape[-2], device=query.device)
        zeros = torch.zeros((query.shape[-2], key.shape[-2]), dtype=query.dtype, device=query.device)
        scores = scores + torch.where(columns <= rows, zeros, torch.full_like(zeros, -math.inf))
    if attn_mask is None:
        return torch.matmul(torch.softmax(scores, -1), value)
    if attn_mask.dtype == torch.bool:
        hidden = torch.logical_not(attn_mask)
        bias = torch.where(attn_mask, 0.0, -math.inf).to(query.dtype)
    else:
        hidden, bias = attn_mask == -math.inf, attn_mask.to(query.dtype)
    weights = torch.softmax(scores + bias, -1)
    blind = torch.logical_not(torch.any(torch.logical_not(hidden), -1, keepdim=True))
    # The constants' pass removes this when the mask is constant and hides no row whole.
    return torch.matmul(torch.where(blind, torch.zeros((), dtype=weights.dtype), weights), value)


def rewrites() -> dict[Any, Callable[..., Any]]:
    """Rewrites of attention."""
    return {aten.scaled_dot_product_attention.default: _attention}
