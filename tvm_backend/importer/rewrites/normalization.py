"""Normalizations of instances, with a batch of any size, of groups without weights, and by the statistics of the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["rewrites"]

aten = torch.ops.aten


def _instance_norm(
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    shape = [1, x.shape[1], *[1] * (x.dim() - 2)]
    if use_input_stats:
        if running_mean is not None:
            return NotImplemented  # it would update them
        dims = list(range(2, x.dim()))
        mean = x.mean(dims, keepdim=True)
        centred = x - mean
        variance = (centred * centred).mean(dims, keepdim=True)
    else:
        centred = x - running_mean.reshape(shape)
        variance = running_var.reshape(shape)
    scale = torch.rsqrt(variance + eps)
    result = centred * (scale if weight is None else scale * weight.reshape(shape))
    return result if bias is None else result + bias.reshape(shape)


def _group_norm(
    x: Any, weight: Any, bias: Any, n: Any, channels: Any, size: Any, groups: int, eps: float
) -> Any:
    if weight is not None and bias is not None:
        return NotImplemented
    grouped = x.reshape([x.shape[0], groups, -1])
    mean = grouped.mean([2], keepdim=True)
    centred = grouped - mean
    rstd = torch.rsqrt((centred * centred).mean([2], keepdim=True) + eps)
    result = (centred * rstd).reshape(x.shape)
    shape = [1, x.shape[1], *[1] * (x.dim() - 2)]
    result = result if weight is None else result * weight.reshape(shape)
    result = result if bias is None else result + bias.reshape(shape)
    return result, mean.squeeze(2), rstd.squeeze(2)


def _batch_norm(x: Any, weight: Any, bias: Any, training: bool, momentum: float, eps: float) -> Any:
    """BatchNorm without running statistics: the batch's own, at inference too."""
    dims = [0, *range(2, x.dim())]
    shape = [1, x.shape[1], *[1] * (x.dim() - 2)]
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    rstd = torch.rsqrt((centred * centred).mean(dims, keepdim=True) + eps)
    result = centred * rstd
    result = result if weight is None else result * weight.reshape(shape)
    result = result if bias is None else result + bias.reshape(shape)
    return result, mean.reshape(-1), rstd.reshape(-1)


def rewrites() -> dict[Any, Callable[..., Any]]:
    """Rewrites of normalizations."""
    return {
        aten.instance_norm.default: _instance_norm,
        aten.native_group_norm.default: _group_norm,
        aten._native_batch_norm_legit.no_stats: _batch_norm,
    }
