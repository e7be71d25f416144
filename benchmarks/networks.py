"""The networks that the benchmarks run: CIFAR ResNet-20, MobileNetV2 and ResNet-18, as plain float modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["INPUT_SHAPES", "NETWORKS", "build", "mobilenet_v2", "resnet18", "resnet20"]


class _CifarBlock(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.stride, self.extra = stride, cout - cin

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride != 1:
            x = nn.functional.pad(
                x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2)
            )
        return torch.relu(out + x)


class CifarResNet(nn.Module):
    """ResNet-20 for 32x32 images, with option-A shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
        for i, (cin, cout, stride) in enumerate(widths, 1):
            blocks = [_CifarBlock(cin, cout, stride), _CifarBlock(cout, cout, 1), _CifarBlock(cout, cout, 1)]
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = nn.functional.adaptive_avg_pool2d(x, 1)
        return self.linear(torch.flatten(x, 1))


class _ConvUnit(nn.Module):
    """A convolution with bias, BatchNorm folded into it, and ReLU6 unless it projects."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int, groups: int, activate: bool) -> None:
        super().__init__()
        self.pad_before = kernel == 3 and stride == 2  # then only right and bottom are padded
        self.conv = nn.Conv2d(cin, cout, kernel, stride, 0 if self.pad_before else kernel // 2, groups=groups)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        if self.pad_before:
            x = nn.functional.pad(x, (0, 1, 0, 1))
        x = self.conv(x)
        return nn.functional.relu6(x) if self.activate else x


class _InvertedResidual(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = cin * expand
        units = [_ConvUnit(cin, hidden, 1, 1, 1, True)] if expand != 1 else []
        units += [_ConvUnit(hidden, hidden, 3, stride, hidden, True), _ConvUnit(hidden, cout, 1, 1, 1, False)]
        self.conv = nn.Sequential(*units)
        self.residual = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 1.0 for 224x224 images, 1001 classes with 0 the background."""

    def __init__(self, classes: int = 1001) -> None:
        super().__init__()
        self.stem = _ConvUnit(3, 32, 3, 2, 1, True)
        settings = [
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ]
        blocks, cin = [], 32
        for expand, cout, count, stride in settings:
            for i in range(count):
                blocks.append(_InvertedResidual(cin, cout, stride if i == 0 else 1, expand))
                cin = cout
        self.blocks = nn.Sequential(*blocks)
        self.head = _ConvUnit(cin, 1280, 1, 1, 1, True)
        self.fc = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.head(self.blocks(self.stem(x))).mean((-2, -1)))


class _BasicBlock(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.downsample: nn.Module | None = None
        if stride != 1 or cin != cout:
            self.downsample = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return torch.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet18(nn.Module):
    """ResNet-18 for 224x224 images, 1000 classes."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages = []
        for cin, cout, stride in [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]:
            stages.append(nn.Sequential(_BasicBlock(cin, cout, stride), _BasicBlock(cout, cout, 1)))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        x = nn.functional.adaptive_avg_pool2d(self.stages(x), 1)
        return self.fc(torch.flatten(x, 1))


def resnet20(data: Path) -> nn.Module:
    """ResNet-20 with the weights in ``<data>/cifar10``."""
    from safetensors.torch import load_file

    model = CifarResNet()
    model.load_state_dict(load_file(data / "cifar10" / "resnet20.safetensors"), strict=False)
    return model.eval()


def mobilenet_v2(data: Path) -> nn.Module:
    """MobileNetV2 with the weights in ``<data>/imagenet_sample``."""
    from safetensors.torch import load_file

    model = MobileNetV2()
    model.load_state_dict(load_file(data / "imagenet_sample" / "mobilenet_v2.safetensors"))
    return model.eval()


def resnet18(_data: Path) -> nn.Module:
    """ResNet-18 with seeded random weights: its speed does not depend on them."""
    generator = torch.Generator().manual_seed(0)
    model = ResNet18()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            fan_in = parameter[0].numel()
            parameter.data = torch.randn(parameter.shape, generator=generator) * (2.0 / fan_in) ** 0.5
    return model.eval()


NETWORKS: dict[str, Callable[[Path], nn.Module]] = {
    "resnet20": resnet20,
    "mobilenet_v2": mobilenet_v2,
    "resnet18": resnet18,
}
INPUT_SHAPES = {"resnet20": (3, 32, 32), "mobilenet_v2": (3, 224, 224), "resnet18": (3, 224, 224)}


def build(name: str, data: Path) -> nn.Module:
    """One of :data:`NETWORKS` in eval mode."""
    return NETWORKS[name](data)
