"""Residual networks and their kin: shortcuts, gates, splits, dense connections."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CspNet", "DenseNet", "RegNet", "RepVgg", "Res2Net", "SeResNet"]


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution with "same" padding and BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    )


class _Squeeze(nn.Module):
    """Squeeze and excitation with a plain sigmoid (Hu et al.)."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // reduction),
            nn.ReLU(inplace=True),
            nn.Linear(channels // reduction, channels),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = F.adaptive_avg_pool2d(x, 1).view(b, c)
        return x * self.fc(y).view(b, c, 1, 1).expand_as(x)


class _SeBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv_bn(inputs, outputs, stride=stride), conv_bn(outputs, outputs)
        self.se = _Squeeze(outputs)
        self.shortcut = (
            conv_bn(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.conv1(x), inplace=True)
        out = self.se(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class SeResNet(nn.Module):
    """ResNet of basic blocks, each with squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.layers = nn.Sequential(_SeBlock(8, 8, 1), _SeBlock(8, 16, 2))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        return self.head(self.layers(x).mean([2, 3]))


class _RegBlock(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.a, self.b = conv_bn(channels, channels, 1), conv_bn(channels, channels, groups=groups)
        self.c = conv_bn(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.c(self.b(self.a(x).relu()).relu()))


class RegNet(nn.Module):
    """Bottlenecks with grouped convolutions (Radosavovic et al.)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16, stride=2)
        self.blocks = nn.ModuleList(_RegBlock(16, 4) for _ in range(2))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu_()
        for block in self.blocks:
            x = block(x)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


class Res2Net(nn.Module):
    """Channels split into scales, each convolved with the sum of what came before (Gao et al.)."""

    def __init__(self, width: int = 4, scales: int = 4) -> None:
        super().__init__()
        channels = width * scales
        self.width = width
        self.stem = conv_bn(3, channels, stride=2)
        self.inner = nn.ModuleList(conv_bn(width, width) for _ in range(scales - 1))
        self.merge = conv_bn(channels, channels, 1)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        parts = torch.split(x, self.width, 1)
        outputs = [parts[0]]
        for part, conv in zip(parts[1:], self.inner, strict=True):
            outputs.append(F.relu(conv(part + outputs[-1] if len(outputs) > 1 else part)))
        x = F.relu(self.merge(torch.cat(outputs, 1)) + x)
        return self.head(x.mean((-2, -1)))


class _RepBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dense, self.point = conv_bn(channels, channels), conv_bn(channels, channels, 1)
        self.identity = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.dense(x) + self.point(x) + self.identity(x))


class RepVgg(nn.Module):
    """Three parallel branches a block, one of them BatchNorm alone (Ding et al.)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, stride=2)
        self.blocks = nn.Sequential(_RepBlock(8), _RepBlock(8))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))).flatten(2).mean(2))


class DenseNet(nn.Module):
    """Every layer reads all before it, BatchNorm first (Huang et al.)."""

    def __init__(self, growth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.layers = nn.ModuleList(
            nn.Sequential(
                OrderedDict(
                    norm=nn.BatchNorm2d(8 + i * growth),
                    relu=nn.ReLU(inplace=True),
                    conv=nn.Conv2d(8 + i * growth, growth, 3, padding=1, bias=False),
                )
            )
            for i in range(3)
        )
        self.norm = nn.BatchNorm2d(8 + 3 * growth)
        self.head = nn.Linear(8 + 3 * growth, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        x = F.relu(self.norm(torch.cat(features, 1)), inplace=True)
        return self.head(F.avg_pool2d(x, x.shape[-1]).flatten(1))


class CspNet(nn.Module):
    """YOLO's C2f: a split, bottlenecks, and everything concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16, stride=2)
        self.cv1, self.cv2 = conv_bn(16, 16, 1), conv_bn(32, 16, 1)
        self.m = nn.ModuleList(conv_bn(8, 8) for _ in range(2))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        y = list(F.silu(self.cv1(x)).chunk(2, 1))
        y.extend(y[-1] + F.silu(m(y[-1])) for m in self.m)
        return self.head(F.silu(self.cv2(torch.cat(y, 1))).mean((2, 3)))
