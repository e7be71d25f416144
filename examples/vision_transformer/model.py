"""A vision transformer for images of CIFAR's size, trained on scikit-learn's digits enlarged to 32 x 32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.digits.model import Split, load_split

__all__ = ["VisionTransformer", "enlarged", "load_images", "train"]


class Block(nn.Module):
    """Attention and MLP behind LayerNorms, each added to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        parts = self.qkv(self.norm1(x)).view(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        x = x + self.proj(y)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """(N, 1, 32, 32) in patches of 4 x 4, a class token, four blocks: (N, 10)."""

    def __init__(self, width: int = 48, heads: int = 4, depth: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 4, 4)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 65, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(x.shape[0], -1, -1), x), 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def enlarged(images: Tensor) -> Tensor:
    """(N, 1, 8, 8) to (N, 1, 32, 32)."""
    return F.interpolate(images, scale_factor=4.0, mode="bilinear", align_corners=False)


def load_images(seed: int = 0) -> Split:
    """The split of the digits, enlarged."""
    parts = vars(load_split(seed))
    return Split(**{name: (enlarged(images), labels) for name, (images, labels) in parts.items()})


def _moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """All images moved by up to four pixels in each direction."""
    padded = F.pad(images, (4, 4, 4, 4), value=float(images.min()))
    top, left = torch.randint(0, 9, (2,), generator=generator).tolist()
    return padded[:, :, top : top + 32, left : left + 32]


def train(
    split: Split, *, epochs: int = 40, seed: int = 0, progress: Callable[[], object] | None = None
) -> VisionTransformer:
    """Train the network from scratch, the same bits for the same seed; ``progress`` is called after every epoch."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network, (images, labels) = VisionTransformer(), split.train
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    batches = -(-len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * batches)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(64):
            logits = network(_moved(images[rows], generator))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if progress is not None:
            progress()
    return network.eval()
