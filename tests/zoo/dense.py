"""Networks with a value for each pixel or point: decoders, pyramids, sets of points."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.residual import conv_bn

__all__ = ["Fpn", "PointNet", "UNet"]


class UNet(nn.Module):
    """Encoder, transposed convolution, skip connection by concatenation (Ronneberger et al.): (N, 4, H, W) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(conv_bn(3, 8), nn.ReLU(inplace=True))
        self.down2 = nn.Sequential(conv_bn(8, 16), nn.ReLU(inplace=True))
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.merge = nn.Sequential(conv_bn(16, 8), nn.ReLU(inplace=True))
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down1(x)
        x = self.up(self.down2(F.max_pool2d(skip, 2)))
        return self.head(self.merge(torch.cat([skip, x], dim=1)))


class Fpn(nn.Module):
    """Three levels, coarser ones resized to the next finer one's size and added (Lin et al.)."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = conv_bn(3, 8), conv_bn(8, 8, stride=2), conv_bn(8, 8, stride=2)
        self.lateral = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(3))
        self.smooth = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        levels = [F.relu(self.c1(x))]
        for conv in (self.c2, self.c3):
            levels.append(F.relu(conv(levels[-1])))
        top = self.lateral[2](levels[2])
        for i in (1, 0):
            top = self.lateral[i](levels[i]) + F.interpolate(top, size=levels[i].shape[-2:], mode="nearest")
        return self.head(F.relu(self.smooth(top)).mean((2, 3)))


class PointNet(nn.Module):
    """The same layers for every point and a maximum over points (Qi et al.): inputs (N, 3, points)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16)
        self.conv2, self.bn2 = nn.Conv1d(16, 32, 1), nn.BatchNorm1d(32)
        self.fc1, self.bn3, self.fc2 = nn.Linear(32, 16), nn.BatchNorm1d(16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = torch.max(x, 2, keepdim=True)[0]
        return self.fc2(F.relu(self.bn3(self.fc1(x.view(-1, 32)))))
