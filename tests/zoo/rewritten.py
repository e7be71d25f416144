"""Functions of images (N, 4, 6, 6) whose operations the ONNX writer and the compiler read in terms of others."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["REWRITTEN"]

_GROUPS = torch.tensor([2, 0, 2, 3])
_PLACES = torch.linspace(-1.4, 1.4, 60).reshape(1, 5, 6, 2)


def _put(x: Tensor, accumulate: bool) -> Tensor:
    rows = torch.arange(x.shape[0]).unsqueeze(1)
    return x.index_put((rows, torch.tensor([[1, 1, -1]])), x[:, :3] * 2, accumulate=accumulate)


def _every_second(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, ::2].mul_(0.5)
    y[:, :, 1::3].clamp_(-0.2)
    y[..., -5::2].add_(1)
    return y


def _sums(x: Tensor) -> tuple[Tensor, ...]:
    index = _GROUPS.reshape(1, -1, 1, 1).expand_as(x)
    return (
        torch.zeros_like(x).index_add(1, _GROUPS, x, alpha=0.5),
        x.scatter_add(1, index, x),
        x.scatter_add(1, index[:, :2], x) + x.scatter(1, index[:, 1:], x * 2),
        x.scatter_reduce(1, index, x * 2 - 1, "amax"),
        x.scatter_reduce(1, index, x, "prod"),
    )


def _sampled(x: Tensor) -> tuple[Tensor, ...]:
    grid = _PLACES.expand(x.shape[0], -1, -1, -1) + 0.3 * x[:, :2, :5].permute(0, 2, 3, 1).tanh()
    paddings = ("zeros", "border", "reflection")
    linear = [
        F.grid_sample(x, grid, padding_mode=padding, align_corners=corners)
        for padding in paddings
        for corners in (False, True)
    ]
    fixed = _PLACES.expand(x.shape[0], -1, -1, -1)
    return (*linear, F.grid_sample(x, fixed, mode="nearest", align_corners=False))


REWRITTEN: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "functions": lambda x: (
        torch.exp2(x) + torch.special.erfc(x) + torch.hypot(x, x + 1),
        torch.ldexp(x, torch.tensor(3)),
        x.round(decimals=1),
        F.softplus(x, beta=2.5) + F.softplus(x, threshold=0.5),
        torch.log10(x.abs() + 0.1),
        torch.remainder(x, 0.7) + torch.remainder(x, -0.7) + x % (x.abs() + 0.5),
        torch.remainder((x * 5).to(torch.int64), -3),
        torch.clamp(x, x.mean(1, keepdim=True) - 0.1, x.mean(1, keepdim=True) + 0.5),
        torch.maximum(x, torch.full_like(x, -math.inf)) + torch.minimum(x, torch.full((4, 6, 6), math.inf)),
    ),
    "places": lambda x: (
        x[:, torch.tensor([0, 1, -1]), torch.tensor([2, 3, -4])],
        x[:, torch.tensor([[0], [3]]), :, torch.tensor([1, 2])],
        x[torch.arange(x.shape[0]), torch.tensor([1])],
        x.unfold(2, 4, 2).unfold(3, 3, 1).amax((4, 5)),
        _put(x, accumulate=True),
        torch.searchsorted(torch.tensor([-1.0, 0.0, 0.5]), x, right=True),
        _every_second(x),
        x.flatten(1).kthvalue(50, 1).values,
        x.narrow(-1, 1, 3) + torch.ops.aten.slice(x, -1, 0, 3),
        x.median(2, keepdim=True).values + x.flatten(2).median(-1).values.reshape(-1, 4, 1, 1),
    ),
    "sums": _sums,
    "products": lambda x: (
        torch.cumprod(x.sigmoid() + 0.3, 1),
        torch.cumprod(x, -1),
        x.sigmoid().prod(1, keepdim=True) + (x * 0.5).prod(-1).unsqueeze(-1),
        torch.cdist(x[:, 0], x[:, 1]),
        torch.cdist(x[:, 0], x[:, 1], p=1.0) + torch.cdist(x[:, 0], x[:, 1], p=math.inf),
    ),
    "pieces": lambda x: (
        F.adaptive_avg_pool2d(x, (4, 5)),
        F.adaptive_avg_pool1d(x.flatten(2), 7),
        F.pad(x, (-1, 2, 1, -3)) + F.pad(x, (-1, 2, 1, -3), value=0.5),
    ),
    "sampled": _sampled,
}
