"""Networks of several inputs or several results."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.residual import conv_bn

__all__ = ["Detector", "ImageAndText", "ImageAndTextHeads", "TokenClassifier", "Tokens"]


class ImageAndText(nn.Module):
    """An image and a sentence of token numbers with a mask, joined before the head; an auxiliary head on the image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 8, stride=2), nn.ReLU(inplace=True))
        self.body = conv_bn(8, 8)
        self.words = nn.Embedding(30, 16)
        self.text = nn.Linear(16, 16)
        self.head = nn.Linear(24, 10)
        self.auxiliary = nn.Linear(8, 4)

    def forward(self, image: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(image)
        x = F.relu(self.body(x) + x).mean((2, 3))
        keep = mask.to(x.dtype).unsqueeze(-1)
        y = (F.relu(self.text(self.words(tokens))) * keep).sum(1) / keep.sum(1).clamp(min=1)
        return self.head(torch.cat([x, y], 1)), self.auxiliary(x)

    @staticmethod
    def batch(rows: int, seed: int = 1) -> dict[str, Tensor]:
        """Keyword arguments of some rows."""
        generator = torch.Generator().manual_seed(seed)
        length = torch.randint(1, 8, (rows, 1), generator=generator)
        return {
            "image": torch.randn(rows, 3, 16, 16, generator=generator),
            "tokens": torch.randint(30, (rows, 7), generator=generator),
            "mask": torch.arange(7).expand(rows, 7) < length,
        }


class ImageAndTextHeads(ImageAndText):
    """The same with its heads by name."""

    def forward(self, image: Tensor, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        head, auxiliary = super().forward(image, tokens, mask)
        return {"auxiliary": auxiliary, "logits": head}


@dataclass
class Tokens:
    """What :class:`TokenClassifier` returns."""

    logits: Tensor
    pooled: Tensor


class TokenClassifier(nn.Module):
    """An encoder that labels every token and gives one row for the sentence, as a data class."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(40, 16), nn.Parameter(torch.randn(9, 16) * 0.1)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head, self.pooler = nn.Linear(16, 6), nn.Linear(16, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tokens:
        x = self.words(input_ids) + self.places
        q, k, v = (each.unflatten(2, (2, 8)).transpose(1, 2) for each in self.qkv(self.norm1(x)).chunk(3, -1))
        seen = attention_mask[:, None, None].bool()
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return Tokens(self.head(x), torch.tanh(self.pooler(x[:, 0])))

    @staticmethod
    def batch(rows: int, seed: int = 1) -> dict[str, Tensor]:
        """Keyword arguments of some rows."""
        generator = torch.Generator().manual_seed(seed)
        length = torch.randint(3, 10, (rows, 1), generator=generator)
        return {
            "input_ids": torch.randint(40, (rows, 9), generator=generator),
            "attention_mask": (torch.arange(9).expand(rows, 9) < length).long(),
        }


class Detector(nn.Module):
    """Scores and boxes at every place of two maps, as a dict, with the anchors that they refer to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 8, stride=2), nn.ReLU(inplace=True))
        self.deep = nn.Sequential(conv_bn(8, 8, stride=2), nn.ReLU(inplace=True))
        self.classes = nn.Conv2d(8, 5, 1)
        self.boxes = nn.Conv2d(8, 4, 1)
        self.register_buffer("anchors", torch.arange(8.0).reshape(2, 4))

    def forward(self, x: Tensor) -> dict[str, object]:
        fine = self.stem(x)
        coarse = self.deep(fine)
        maps = [fine, coarse]
        scores = torch.cat([self.classes(each).flatten(2).transpose(1, 2) for each in maps], 1)
        return {"scores": scores, "boxes": [self.boxes(each) for each in maps], "anchors": self.anchors}
