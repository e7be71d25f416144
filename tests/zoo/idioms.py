"""One small module for each way of writing things down that a reader of graphs can get wrong.

Every idiom takes (N, 3, 8, 8) images, ends in (N, 10) logits and has a convolution before and a linear layer after what it
is about, so that the whole of the engine and of the compiler can be tried on it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.mutation import MUTATION

__all__ = ["ARITHMETIC", "BATCH", "COMPUTED_WEIGHTS", "IDIOMS", "INDEXING", "MUTATION", "Idiom", "idiom"]


class Idiom(nn.Module):
    """Convolution, the idiom, mean over pixels, linear layer."""

    def __init__(self, function: Callable[[Tensor], Tensor], channels: int = 8, features: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(features, 8, 1)
        self.fc = nn.Linear(8, 10)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(self.conv(x))
        return self.fc(F.relu(self.conv2(y)).mean((2, 3)))


def idiom(name: str) -> nn.Module:
    """The idiom of that name: the same weights at every call, in evaluation mode."""
    made = IDIOMS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = made() if isinstance(made, type) else Idiom(made)
    return module.eval()


# ---- numbers, scalars and tensors without axes ----------------------------------------------------------------------


class _ScalarParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 10)
        self.log_scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((self.conv(x) * self.log_scale.exp()).mean((2, 3)))


class _SumOfList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(sum([self.a(x), self.b(x)])).mean((2, 3)))


class _CollidingNames(nn.Module):
    """``a.b_conv`` and ``a_b.conv`` are one name once dots are underscores."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_b = nn.Module(), nn.Module()
        self.a.b_conv, self.a_b.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.a_b.conv(F.relu(self.a.b_conv(x)))).mean((2, 3)))


class _BatchStatistics(nn.Module):
    """BatchNorm that uses the statistics of the batch in evaluation mode as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(self.conv(x), None, None, self.bn.weight, self.bn.bias, training=True)
        return self.fc(F.relu(y).mean((2, 3)))


class _UntrackedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, track_running_stats=False)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.bn(self.conv(x))).mean((2, 3)))


ARITHMETIC: dict[str, Callable[[Tensor], Tensor] | type[nn.Module]] = {
    "hard-sigmoid": lambda y: y * (F.relu6(y + 3) / 6),
    "plus-number": lambda y: y + 3,
    "number-minus": lambda y: 1 - y,
    "divide-number": lambda y: y / 2.5,
    "number-divided": lambda y: 1 / (y.abs() + 2),
    "times-0d-tensor": lambda y: y * torch.tensor(0.5),
    "scalar-parameter": _ScalarParameter,
    "sum-of-list": _SumOfList,
    "addcmul": lambda y: (
        torch.addcmul(y, y.abs(), y.flip(1), value=0.3) + torch.addcmul(y, y, y.mean(1, True))
    ),
    "add-alpha": lambda y: torch.add(y, y.abs(), alpha=0.3),
    "sub-alpha": lambda y: torch.sub(y, y.abs(), alpha=2),
    "rsub": lambda y: torch.rsub(y, y.abs(), alpha=0.5),
    "selu": F.selu,
    "celu": lambda y: F.celu(y, 1.5),
    "elu": lambda y: F.elu(y, 0.7),
    "softplus": lambda y: F.softplus(y, 2.0, 10.0),
    "threshold": lambda y: F.threshold(y, 0.1, -0.5),
    "hardtanh": lambda y: F.hardtanh(y, -0.3, 0.4),
    "leaky-relu": lambda y: F.leaky_relu(y, 0.2),
    "prelu": lambda y: F.prelu(y, torch.tensor([0.3])),
    "rrelu": lambda y: F.rrelu(y, 0.1, 0.3),
    "rrelu-inplace": lambda y: F.rrelu(y, inplace=True),
    "mish": F.mish,
    "gelu-tanh": lambda y: F.gelu(y, approximate="tanh"),
    "swish-by-hand": lambda y: y * torch.sigmoid(y),
    "minimum-maximum": lambda y: torch.maximum(torch.minimum(y, y.flip(3)), y * 0.1),
    "where": lambda y: torch.where(y > 0, y, 0.1 * y),
    "power": lambda y: y.pow(2) + y**3 * 0.1,
    "powers-of-two": lambda y: torch.exp2(y.clamp(max=1)) + y.ldexp(torch.tensor(1)),
    "lengths": lambda y: torch.hypot(y, y.flip(1)) + torch.erfc(y),
    "close": lambda y: y.masked_fill(torch.isclose(y, y.round(), atol=0.05), 0.3),
    "clamp-one-side": lambda y: y.clamp(min=-0.2) + y.clamp(max=0.1),
    "softmax-channels": lambda y: y.softmax(1) * 4,
    "log-softmax": lambda y: y.log_softmax(1),
    "logsumexp": lambda y: y - torch.logsumexp(y, 1, keepdim=True),
    "layer-norm": lambda y: F.layer_norm(y, y.shape[1:]),
    "group-norm": lambda y: F.group_norm(y, 2),
    "instance-norm": lambda y: F.instance_norm(y),
    "normalize": lambda y: F.normalize(y, dim=1),
    "standardize": lambda y: (y - y.mean((2, 3), keepdim=True)) / (y.std((2, 3), keepdim=True) + 1e-3),
    "double-inside": lambda y: (y.double() * 1.5).float(),
    "variance": lambda y: y * y.var(1, keepdim=True),
    "colliding-names": _CollidingNames,
    "batch-statistics": _BatchStatistics,
    "untracked-norm": _UntrackedNorm,
}

# ---- where values come from -----------------------------------------------------------------------------------------

INDEXING: dict[str, Callable[[Tensor], Tensor]] = {
    "peaks": lambda y: y * (F.max_pool2d(y, 3, 1, 1) == y),
    "select-last": lambda y: y[:, -1:] * y[:, :, -1, -1][:, :, None, None],
    "select-negative": lambda y: y + y.select(2, -2).unsqueeze(2),
    "index-list": lambda y: y[:, [0, -1, 2, -3, 4, 5, 6, 7]],
    "index-tensor": lambda y: y[:, torch.tensor([7, 6, -6, 4, 3, 2, 1, 0])],
    "index-mask": lambda y: y[:, :, torch.tensor([True, False, True, True] * 2)],
    "index-select": lambda y: y.index_select(1, torch.tensor([3, 2, 1, 0, 7, 6, 5, 4])),
    "slice-negative": lambda y: F.pad(y[:, :, 1:-1, -7:-1], (1, 1, 1, 1)),
    "slice-step": lambda y: y[:, :, ::2, 1::2],
    "flip": lambda y: y.flip(1, 3),
    "roll": lambda y: y.roll((1, -2), (2, 3)),
    "gather": lambda y: y.gather(3, torch.zeros_like(y, dtype=torch.long) + 3),
    "repeat": lambda y: y[:, :4].repeat(1, 2, 1, 1),
    "repeat-interleave": lambda y: y[:, :4].repeat_interleave(2, 1),
    "repeat-by-table": lambda y: y.repeat_interleave(torch.tensor([1, 3, 0, 2, 2, 2, 1, 1]), dim=3)[..., :11],
    "stack": lambda y: torch.stack([y[:, :4], y[:, 4:]], 2).flatten(1, 2),
    "unbind": lambda y: torch.stack(y.unbind(1)[::-1], 1),
    "cat-nothing": lambda y: torch.cat([y, y[:, 8:]], 1),
    "split-uneven": lambda y: torch.cat(y.split([1, 5, 2], 1)[::-1], 1),
    "pixel-shuffle": lambda y: F.pixel_unshuffle(F.pixel_shuffle(y, 2), 2),
    "einsum": lambda y: torch.einsum("nchw,ndhw->ncd", y, y).unsqueeze(-1) * 0.05,
    "max-values": lambda y: y - y.max(1, keepdim=True)[0],
    "amax": lambda y: y - y.amax((2, 3), keepdim=True),
    "amin": lambda y: y - y.amin(1, keepdim=True),
    "cumsum": lambda y: y.cumsum(3) * 0.2,
    "unfold": lambda y: (
        F.unfold(y, 3, padding=1).view(y.shape[0], 8, 9, 64).mean(2).view(y.shape[0], 8, 8, 8)
    ),
    "pad-reflect": lambda y: F.pad(y, (1, 2, 2, 1), "reflect"),
    "pad-replicate": lambda y: F.pad(y, (1, 2, 2, 1), "replicate"),
    "pad-circular": lambda y: F.pad(y, (1, 2, 2, 1), "circular"),
    "pad-value": lambda y: F.pad(y, (1, 2, 0, 1), value=0.7),
    "avg-pool-divisor": lambda y: F.avg_pool2d(y, 2, divisor_override=3),
    "avg-pool-ceil": lambda y: F.avg_pool2d(y, 3, 2, ceil_mode=True),
    "avg-pool-exclude": lambda y: F.avg_pool2d(y, 3, 2, 1, count_include_pad=False),
    "max-pool-dilated": lambda y: F.max_pool2d(y, 2, 1, dilation=2),
    "max-pool-ceil": lambda y: F.max_pool2d(y, 3, 2, 1, ceil_mode=True),
    "adaptive-avg": lambda y: F.adaptive_avg_pool2d(y, 3),
    "adaptive-max": lambda y: F.adaptive_max_pool2d(y, (3, 5)),
    "lp-pool": lambda y: F.lp_pool2d(y, 2, 2),
    "nearest-whole": lambda y: F.interpolate(y, scale_factor=2),
    "nearest-fraction": lambda y: F.interpolate(y, size=(11, 7)),
    "nearest-scale": lambda y: F.interpolate(y, scale_factor=1.7),
    "nearest-exact": lambda y: F.interpolate(y, size=(11, 5), mode="nearest-exact"),
    "bilinear": lambda y: F.interpolate(y, size=(11, 7), mode="bilinear"),
    "bilinear-corners": lambda y: F.interpolate(y, size=(11, 7), mode="bilinear", align_corners=True),
    "bilinear-scale": lambda y: F.interpolate(y, scale_factor=1.7, mode="bilinear"),
    "bilinear-antialias": lambda y: F.interpolate(y, size=(5, 5), mode="bilinear", antialias=True),
    "bicubic": lambda y: F.interpolate(y, size=(11, 7), mode="bicubic"),
    "area": lambda y: F.interpolate(y, size=(4, 4), mode="area"),
}

# ---- where the batch size shows ---------------------------------------------------------------------------------------


class _ClassToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 10)
        self.cls = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        return self.fc(F.relu(x[:, 0] + x.mean(1)))


class _MultiQuery(nn.Module):
    """Several heads of queries, one of keys and values that is expanded to all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.q, self.kv = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 8), nn.Linear(8, 8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        b, t, _ = x.shape
        q = self.q(x).view(b, t, 2, 4).transpose(1, 2)
        k, v = self.kv(x).view(b, t, 1, 8).transpose(1, 2).chunk(2, -1)
        k, v = k.expand(b, 2, t, 4), v.expand(b, 2, t, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, 8)
        return self.fc(y.mean(1))


BATCH: dict[str, Callable[[Tensor], Tensor] | type[nn.Module]] = {
    "len-expand": _ClassToken,
    "multi-query": _MultiQuery,
    "view-batch": lambda y: y.view(y.size(0), -1).view(y.size(0), 8, 8, 8),
    "reshape-minus-one": lambda y: y.reshape(-1, 8, 64).reshape(-1, 8, 8, 8),
    "fold-batch": lambda y: y.view(-1, 8, 8).relu().view(-1, 8, 8, 8),
    "new-zeros": lambda y: y + y.new_zeros(y.shape[0], 1, 1, 1) + y.new_ones(y.shape[0], 1, 1, 1) * 0.1,
    "arange-positions": lambda y: y + torch.arange(y.shape[-1]) * 0.1,
    "by-rows": lambda y: y * y.shape[0] / y.shape[0] + y * y.numel() / (y.shape[0] * 600),
    "repeated-by-rows": lambda y: y + torch.linspace(-1, 1, 8).view(1, 8, 1, 1).repeat(y.shape[0], 1, 8, 8),
    "ones-batch": lambda y: torch.cat([y[:, :7], torch.ones(y.shape[0], 1, 8, 8)], 1),
    "transposed-batch": lambda y: y.transpose(0, 1).relu().transpose(0, 1),
}

# ---- weights that are no parameter but computed from parameters alone ------------------------------------------------


class _Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class _WithConv(nn.Module):
    make: Callable[[], nn.Module]

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = type(self).make(), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))


class _WeightNorm(_WithConv):
    make = staticmethod(lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)))


class _SpectralNorm(_WithConv):
    make = staticmethod(lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 3)))


class _WeightStandardisation(_WithConv):
    make = staticmethod(lambda: _Standardised(3, 8, 3, padding=1))


class _HalvedWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.conv.weight * 0.5, self.conv.bias)
        return F.linear(y.mean((2, 3)), self.fc.weight * 0.5, self.fc.bias)


COMPUTED_WEIGHTS: dict[str, type[nn.Module]] = {
    "weight-norm": _WeightNorm,
    "spectral-norm": _SpectralNorm,
    "weight-standardisation": _WeightStandardisation,
    "halved-weight": _HalvedWeight,
}

IDIOMS: dict[str, Callable[[Tensor], Tensor] | type[nn.Module]] = {
    **MUTATION,
    **ARITHMETIC,
    **INDEXING,
    **BATCH,
    **COMPUTED_WEIGHTS,
}
