"""Small models of different shapes for the tests of the engine."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

__all__ = [
    "MODELS",
    "Attention",
    "Block",
    "Gelu1d",
    "GroupedNet",
    "SmallResNet",
    "Uneven",
    "assert_same",
    "randomise",
    "small_inputs",
]


class Block(nn.Module):
    """Residual block with an option-A shortcut."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.stride, self.pad = stride, (outer - inner) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class SmallResNet(nn.Module):
    """conv-BN-ReLU, two blocks, average pool, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.block1, self.block2 = Block(8, 8, 1), Block(8, 16, 2)
        self.drop = nn.Dropout()
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(self.stem(x)))
        return self.fc(self.drop(x.mean((2, 3)).flatten(1)))


class GroupedNet(nn.Module):
    """Inverted residual with a depthwise, then a grouped convolution, ReLU6 and concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(4, 12, 1)
        self.bn = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.grouped = nn.Conv2d(12, 8, 3, padding="same", groups=4)
        self.fc = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.bn(self.expand(x)))
        y = F.relu6(self.depthwise(y))
        z = torch.cat([y, F.silu(self.grouped(y))], 1)
        return self.fc(F.adaptive_avg_pool2d(z, 1).view(x.shape[0], -1))


class Gelu1d(nn.Module):
    """1-d convolutions and GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(2, 6, 5, stride=2)
        self.b = nn.Conv1d(6, 6, 3, groups=2, padding=1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.gelu(self.b(F.gelu(self.a(x)))).mean(-1))


class Uneven(nn.Module):
    """Channels of very different ranges before a depthwise and before a dense convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6, stride=2)
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.c, self.d, self.fc = nn.Conv2d(6, 5, 1), nn.Conv2d(5, 5, 1), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.b(self.pad(F.relu6(self.a(x)))))
        y = F.relu(self.c(y))
        return self.fc(F.silu(self.d(y)).mean((2, 3)))


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Seeded weights and BatchNorm statistics far from their defaults; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            count = module.num_features
            module.weight.data = 0.5 + torch.rand(count, generator=generator)
            module.bias.data = 0.2 * torch.randn(count, generator=generator)
            module.running_mean = 0.3 * torch.randn(count, generator=generator)
            module.running_var = 0.5 + torch.rand(count, generator=generator)
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            fan = module.weight[0].numel()
            module.weight.data = torch.randn(module.weight.shape, generator=generator) / fan**0.5
            if module.bias is not None:
                module.bias.data = 0.1 * torch.randn(module.bias.shape, generator=generator)
    return model.eval()


def small_inputs(*shape: int, seed: int = 1) -> Tensor:
    """Seeded normal inputs."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Attention(nn.Module):
    """One transformer block on patches, with a class token."""

    def __init__(self, product: str = "sdpa") -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(5)) * 0.1)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 4)
        self.product = product

    def attend(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        if self.product == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = torch.softmax(q @ k.transpose(-2, -1) / (c // 2) ** 0.5, -1) @ v
        return self.proj(y.transpose(1, 2).reshape(n, t, c))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        x = x + self.attend(self.norm1(x))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x[:, 0])


#: Models with the shape of a batch.
MODELS = [
    (SmallResNet, (4, 3, 12, 12)),
    (GroupedNet, (4, 4, 8, 8)),
    (Gelu1d, (4, 2, 40)),
    (Attention, (4, 3, 16, 16)),
]


def assert_same(a: fx.GraphModule, b: fx.GraphModule) -> None:
    """Both compute the same with the same numbers."""
    assert a.code == b.code
    for (name, x), (other, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(x, y), name
