"""Networks of tokens: a decoder that gives logits for every position, an encoder that gives one row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Encoder", "Llama"]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class _Decoder(nn.Module):
    """Grouped-query attention with rotary positions, and a gated network behind it."""

    def __init__(self, dim: int, heads: int, shared: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.shared, self.size = heads, shared, dim // heads
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.q, self.o = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, shared * self.size, bias=False)
        self.v = nn.Linear(dim, shared * self.size, bias=False)
        self.gate, self.up = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n, t, c = x.shape
        q = self.q(x).view(n, t, self.heads, self.size).transpose(1, 2)
        k = self.k(x).view(n, t, self.shared, self.size).transpose(1, 2)
        v = self.v(x).view(n, t, self.shared, self.size).transpose(1, 2)
        times = self.heads // self.shared
        k = _rotated(k, cos, sin).repeat_interleave(times, 1)
        y = F.scaled_dot_product_attention(
            _rotated(q, cos, sin), k, v.repeat_interleave(times, 1), is_causal=True
        )
        return self.o(y.transpose(1, 2).reshape(n, t, c))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x), cos, sin)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """Token numbers (N, T) to logits (N, T, V), the embedding tied to the output (Touvron et al.)."""

    def __init__(self, dim: int = 16, heads: int = 4, depth: int = 2, vocabulary: int = 50) -> None:
        super().__init__()
        self.size = dim // heads
        self.embedding = nn.Embedding(vocabulary, dim)
        self.blocks = nn.ModuleList(_Decoder(dim, heads, heads // 2, 24) for _ in range(depth))
        self.norm = nn.RMSNorm(dim)
        for block in self.blocks:
            nn.init.uniform_(block.norm1.weight, 0.5, 1.5)
            nn.init.uniform_(block.norm2.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        rate = 10000.0 ** (-torch.arange(0, self.size, 2) / self.size)
        angle = torch.outer(torch.arange(x.shape[1]), rate).repeat(1, 2)
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x, angle.cos(), angle.sin())
        return F.linear(self.norm(x), self.embedding.weight)


class _EncoderLayer(nn.Module):
    """Post-norm, the products of attention written out."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, dim // heads
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.output, self.norm1, self.norm2 = nn.Linear(dim, dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, self.size).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = torch.matmul(q, k.transpose(-1, -2)) / self.size**0.5
        y = torch.matmul(scores.softmax(-1), v).permute(0, 2, 1, 3).contiguous()
        x = self.norm1(x + self.output(y.view(y.shape[0], y.shape[1], -1)))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Encoder(nn.Module):
    """Token numbers (N, T) to one row of logits, from the first token (Devlin et al.)."""

    def __init__(self, dim: int = 16, tokens: int = 12) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(50, dim), nn.Embedding(tokens, dim)
        self.norm = nn.LayerNorm(dim)
        self.layers = nn.Sequential(_EncoderLayer(dim, 2), _EncoderLayer(dim, 2))
        self.pooler, self.head = nn.Linear(dim, dim), nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.words(x) + self.positions(torch.arange(x.shape[1])))
        return self.head(torch.tanh(self.pooler(self.layers(x)[:, 0])))
