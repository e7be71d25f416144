"""Networks of attention and what stands in for it: class tokens, windows, mixed tokens, pooled sequences."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Cct", "Mixer", "SwinTransformer", "VisionTransformer", "VisionTransformerMha"]


class _Attention(nn.Module):
    """One linear layer for q, k and v, as timm writes it."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = _Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Class token, learned positions, pre-norm blocks (Dosovitskiy et al.)."""

    def __init__(self, dim: int = 16, heads: int = 2, depth: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.cls = nn.Parameter(0.1 * torch.randn(1, 1, dim))
        self.positions = nn.Parameter(0.1 * torch.randn(1, 17, dim))
        self.blocks = nn.Sequential(*(_Block(dim, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(x.shape[0], -1, -1), x), dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class VisionTransformerMha(nn.Module):
    """The same from PyTorch's own parts."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.positions = nn.Parameter(0.1 * torch.randn(16, dim))
        self.norm = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(
            dim, 2, 32, activation="gelu", batch_first=True, norm_first=True
        )
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).permute(0, 2, 1) + self.positions
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head(self.encoder(x).mean(dim=1))


class Cct(nn.Module):
    """Convolutions first, a transformer behind, and a sequence pooled by a softmax (Hassani et al.)."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, dim, 3, 2, 1, bias=False), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.block = _Block(dim, 2)
        self.pool, self.head = nn.Linear(dim, 1), nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x).flatten(2).transpose(-2, -1))
        weights = F.softmax(self.pool(x), dim=1).transpose(-1, -2)
        return self.head(torch.matmul(weights, x).squeeze(-2))


class _WindowBlock(nn.Module):
    """Attention inside windows, shifted by a roll, with a bias by relative position."""

    def __init__(self, dim: int, size: int, window: int, shift: int) -> None:
        super().__init__()
        self.size, self.window, self.shift = size, window, shift
        self.norm, self.qkv, self.proj = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias = nn.Parameter(0.1 * torch.randn(2, window**2, window**2))

    def forward(self, x: Tensor) -> Tensor:
        b, tokens, c = x.shape
        s, w = self.size, self.window
        y = self.norm(x).view(b, s, s, c)
        if self.shift:
            y = torch.roll(y, shifts=(-self.shift, -self.shift), dims=(1, 2))
        y = y.view(b, s // w, w, s // w, w, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, c)
        qkv = self.qkv(y).reshape(y.shape[0], w * w, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = (q * (c // 2) ** -0.5) @ k.transpose(-2, -1) + self.bias.unsqueeze(0)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, w * w, c)
        y = self.proj(y).view(b, s // w, s // w, w, w, c).permute(0, 1, 3, 2, 4, 5).reshape(b, s, s, c)
        if self.shift:
            y = torch.roll(y, shifts=(self.shift, self.shift), dims=(1, 2))
        return x + y.reshape(b, tokens, c)


class SwinTransformer(nn.Module):
    """Two window blocks, the second shifted, and merged patches (Liu et al.)."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 2, 2)
        self.blocks = nn.Sequential(_WindowBlock(dim, 8, 4, 0), _WindowBlock(dim, 8, 4, 2))
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)
        self.head = nn.Linear(2 * dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x)
        n, c, h, w = x.shape
        x = self.blocks(x.flatten(2).transpose(1, 2)).view(n, h, w, c)
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.head(self.reduction(self.norm(x)).mean((1, 2)))


class Mixer(nn.Module):
    """Linear layers across tokens and across channels (Tolstikhin et al.)."""

    def __init__(self, dim: int = 12, tokens: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mix_tokens = nn.Sequential(nn.Linear(tokens, 24), nn.GELU(), nn.Linear(24, tokens))
        self.mix_channels = nn.Sequential(nn.Linear(dim, 24), nn.GELU(), nn.Linear(24, dim))
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.mix_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.mix_channels(self.norm2(x))
        return self.head(self.norm3(x).mean(1))
