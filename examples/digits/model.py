"""A small residual network for 8 x 8 digits, and the data split that the example uses."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["DigitsResNet", "Split", "build", "load_split", "rounded", "train"]


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (a 1 x 1 convolution where the shape changes)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitsResNet(nn.Module):
    """Stem, three residual stages (two with stride 2), average pool, linear: (N, 1, 8, 8) to (N, 10)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.stages = nn.Sequential(
            Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.pool(self.stages(self.stem(x))), 1))


def build() -> DigitsResNet:
    """Return the untrained network; the factory that ``cat-ptq --model`` names."""
    return DigitsResNet()


@dataclass(frozen=True)
class Split:
    """Images (n, 1, 8, 8) float32, standardised, and labels (n,) int64, in four disjoint parts."""

    train: tuple[Tensor, Tensor]
    calibration: tuple[Tensor, Tensor]
    tune: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_split(seed: int = 0) -> Split:
    """Split scikit-learn's 1797 digits: 650 to train, 347 to calibrate, 200 to tune, 600 to test."""
    data = load_digits()
    images = torch.from_numpy((data.images.astype(np.float32) - 4.884) / 6.017).unsqueeze(1)
    labels = torch.from_numpy(data.target.astype(np.int64))
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    parts = torch.split(order, [650, 347, 200, 600])
    return Split(*((images[part], labels[part]) for part in parts))


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image by up to one pixel in each direction."""
    padded = F.pad(images, (1, 1, 1, 1), value=float(images.min()))
    rows, columns = torch.randint(0, 3, (2, len(images)), generator=generator)
    windows = padded.unfold(2, 8, 1).unfold(3, 8, 1)
    return windows[torch.arange(len(images)), :, rows, columns]


def train(split: Split, *, epochs: int = 40, seed: int = 0, progress: object = None) -> DigitsResNet:
    """Train the network from scratch, the same bits for the same seed.

    `progress` is called without arguments after every epoch when given.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = build()
    images, labels = split.train
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    batches = -(-len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * batches)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(64):
            loss = F.cross_entropy(
                network(_shifted(images[rows], generator)), labels[rows], label_smoothing=0.05
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if callable(progress):
            progress()
    return network.eval()


def rounded(network: nn.Module, bits: int) -> nn.Module:
    """A copy whose weights are rounded to nearest on one scale a tensor, without care or data, as a poor converter does it.

    Parameters
    ----------
    network : nn.Module
        Left as it is.
    bits : int
        Of every weight, the first and the last layer's included.
    """
    made = copy.deepcopy(network).eval()
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                scale = parameter.abs().max() / (most + 0.5)
                parameter.copy_((parameter / scale - 0.5).round().clamp(least, most).add(0.5) * scale)
    return made
