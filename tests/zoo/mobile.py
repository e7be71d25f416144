"""Networks for phones: depthwise convolutions, hard activations, shuffles, cheap features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.residual import conv_bn

__all__ = ["ConvNeXt", "GhostNet", "Inception", "MobileNetV3", "ShuffleNet"]


def _hard_sigmoid(x: Tensor) -> Tensor:
    return F.relu6(x + 3) / 6


class _InvertedResidual(nn.Module):
    """Expansion, depthwise, a gate of hard sigmoids, projection; h-swish written by hand, as many ports have it."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.expand, self.project = conv_bn(channels, hidden, 1), conv_bn(hidden, channels, 1)
        self.depthwise = conv_bn(hidden, hidden, groups=hidden)
        self.reduce, self.restore = nn.Conv2d(hidden, 8, 1), nn.Conv2d(8, hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(x)
        y = y * _hard_sigmoid(y)
        y = self.depthwise(y)
        gate = self.restore(F.relu(self.reduce(F.adaptive_avg_pool2d(y, 1))))
        y = y * _hard_sigmoid(gate)
        return x + self.project(F.hardswish(y))


class MobileNetV3(nn.Module):
    """Inverted residuals with gates (Howard et al.)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, stride=2)
        self.blocks = nn.Sequential(_InvertedResidual(8, 24), _InvertedResidual(8, 24))
        self.head = nn.Sequential(nn.Linear(8, 16), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(16, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.hardswish(self.stem(x), inplace=True))
        return self.head(x.mean([2, 3]))


class ShuffleNet(nn.Module):
    """Half of the channels pass by, then both halves are shuffled (Ma et al.)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16, stride=2)
        self.branches = nn.ModuleList(
            nn.Sequential(
                conv_bn(8, 8, 1),
                nn.ReLU(inplace=True),
                conv_bn(8, 8, groups=8),
                conv_bn(8, 8, 1),
                nn.ReLU(inplace=True),
            )
            for _ in range(2)
        )
        self.head = nn.Linear(16, 10)

    @staticmethod
    def _shuffle(x: Tensor, groups: int) -> Tensor:
        n, c, h, w = x.data.size()
        x = x.view(n, groups, c // groups, h, w)
        return torch.transpose(x, 1, 2).contiguous().view(n, -1, h, w)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for branch in self.branches:
            left, right = x.chunk(2, dim=1)
            x = self._shuffle(torch.cat((left, branch(right)), dim=1), 2)
        return self.head(x.mean([2, 3]))


class GhostNet(nn.Module):
    """Half of the features made from the other half by cheap operations, then sliced (Han et al.)."""

    def __init__(self, channels: int = 12) -> None:
        super().__init__()
        self.channels = channels
        self.stem = conv_bn(3, channels, stride=2)
        half = (channels + 1) // 2
        self.primary, self.cheap = conv_bn(channels, half, 1), conv_bn(half, half, groups=half)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        first = F.relu(self.primary(x))
        out = torch.cat([first, F.relu(self.cheap(first))], dim=1)
        x = x + out[:, : self.channels, :, :]
        return self.head(F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1))


class Inception(nn.Module):
    """Four branches of different reach, one of them pooled, concatenated (Szegedy et al.)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, stride=2)
        self.one = conv_bn(8, 4, 1)
        self.three = nn.Sequential(conv_bn(8, 4, 1), nn.ReLU(), conv_bn(4, 6))
        self.factored = nn.Sequential(
            nn.Conv2d(8, 4, (1, 5), padding=(0, 2)), nn.ReLU(), nn.Conv2d(4, 4, (5, 1), padding=(2, 0))
        )
        self.pooled = conv_bn(8, 4, 1)
        self.head = nn.Linear(18, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        pooled = self.pooled(F.avg_pool2d(x, 3, stride=1, padding=1))
        x = F.relu(torch.cat([self.one(x), self.three(x), self.factored(x), pooled], 1))
        x = F.max_pool2d(x, 3, stride=2, ceil_mode=True)
        return self.head(x.mean((2, 3)))


class _NextBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(0.5 * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x).permute(0, 2, 3, 1)
        y = self.gamma * self.down(F.gelu(self.up(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Large depthwise kernels, LayerNorm over channels, a layer scale (Liu et al.)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.Sequential(_NextBlock(8), _NextBlock(8))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x)).mean([-2, -1])))
