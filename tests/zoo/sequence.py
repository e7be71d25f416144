"""Networks over time: recurrent, convolutional, dilated, and bags of words."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Gru", "Lstm", "Tcn", "TextCnn", "WaveNet"]


class Lstm(nn.Module):
    """The last step of an LSTM: inputs (N, T, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 12, batch_first=True)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.lstm(x)
        return self.head(out[:, -1])


class Gru(nn.Module):
    """A GRU in both directions behind a convolution: inputs (N, T, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.gru = nn.GRU(8, 8, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x.transpose(1, 2))).transpose(1, 2)
        return self.head(self.gru(x)[0][:, -1, :])


class TextCnn(nn.Module):
    """Convolutions of three widths over embedded words, each with its maximum (Kim): inputs (N, T) word numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.convs = nn.ModuleList(nn.Conv1d(8, 6, width) for width in (2, 3, 4))
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(18, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x).permute(0, 2, 1)
        pooled = [
            F.max_pool1d(F.relu(conv(x)), int(x.shape[2]) - i - 1).squeeze(2)
            for i, conv in enumerate(self.convs)
        ]
        return self.head(self.dropout(torch.cat(pooled, dim=1)))


class _CausalBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.padding = 2 * dilation
        self.conv = nn.utils.parametrizations.weight_norm(
            nn.Conv1d(inputs, outputs, 3, padding=self.padding, dilation=dilation)
        )
        self.downsample = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x)[:, :, : -self.padding].contiguous())
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Tcn(nn.Module):
    """Causal dilated convolutions with weight norm and cut ends (Bai et al.): inputs (N, T, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(_CausalBlock(6, 8, 1), _CausalBlock(8, 8, 2))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x.transpose(1, 2))[:, :, -1])


class WaveNet(nn.Module):
    """Gated dilated convolutions whose skips are summed (van den Oord et al.): inputs (N, T, 6)."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.start = nn.Conv1d(6, channels, 1)
        self.filters = nn.ModuleList(nn.Conv1d(channels, channels, 2, dilation=2**i) for i in range(3))
        self.gates = nn.ModuleList(nn.Conv1d(channels, channels, 2, dilation=2**i) for i in range(3))
        self.skips = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in range(3))
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x.transpose(1, 2))
        total = 0
        for i, (f, g, s) in enumerate(zip(self.filters, self.gates, self.skips, strict=True)):
            padded = F.pad(x, (2**i, 0))
            y = torch.tanh(f(padded)) * torch.sigmoid(g(padded))
            total = s(y) + total
            x = x + y
        return self.head(F.relu(total).mean(-1))
