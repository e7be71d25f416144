"""Functions of a tensor (5, 4, 6, 6) that between them use every operator and argument that the importer lets through."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from tests.tvm_backend.importer.pooling import POOLING
from tests.zoo.rewritten import REWRITTEN

UNARY = [
    "abs",
    "asinh",
    "atan",
    "ceil",
    "cos",
    "cosh",
    "erf",
    "exp",
    "expm1",
    "floor",
    "isfinite",
    "isinf",
    "isnan",
    "neg",
    "reciprocal",
    "relu",
    "round",
    "sigmoid",
    "sign",
    "sin",
    "sinh",
    "square",
    "tan",
    "tanh",
    "trunc",
]
POSITIVE = ["log", "log2", "log10", "log1p", "sqrt", "rsqrt", "acosh"]
SMALL = ["acos", "asin", "atanh"]
COMPARE = ["eq", "ne", "lt", "le", "gt", "ge"]


def whole(x):
    return torch.round(x * 3).to(torch.int64)


def _attend(x, **options):
    return F.scaled_dot_product_attention(x, x.flip(-1), x, **options)


def _slices(x):
    y = torch.zeros_like(x)
    y[:, 1:3] = x[:, :2] * 2
    y[:, :, -1] = 1.0
    y[:, 0, ::2] = x[:, 1, ::2]
    return y


def _filled(x):
    y = torch.empty(x.shape[0], 4, 6, 6)
    y[:, :2], y[:, 2:] = x[:, 2:], x[:, :2]
    return y


TABLE = torch.arange(24.0).reshape(4, 6)
ROWS, COLUMNS = torch.tensor([0, -1, 2]), torch.tensor([1, -2, 0])

# Each takes x of shape (5, 4, 6, 6).
CASES = {
    **POOLING,
    "unary": lambda x: tuple(getattr(torch, name)(x) for name in UNARY),
    "positive": lambda x: tuple(getattr(torch, name)(x.abs() + 1.1) for name in POSITIVE),
    "small": lambda x: tuple(getattr(torch, name)(torch.tanh(x) * 0.9) for name in SMALL),
    "silu": lambda x: (F.silu(x), torch.logical_not(x > 0), torch.bitwise_not(whole(x))),
    "binary": lambda x: (
        x + x.flip(1),
        x - x.flip(1),
        x * x.flip(1),
        x / (x.flip(1).abs() + 1),
        torch.maximum(x, x.flip(2)),
        torch.minimum(x, x.flip(2)),
        torch.atan2(x, x.flip(3)),
        torch.remainder(x, 0.7),
        torch.fmod(x, 0.7),
        torch.remainder(x, x.flip(1).abs() + 0.5),
        torch.fmod(x, x.flip(1).abs() + 0.5),
    ),
    "alpha": lambda x: (
        torch.add(x, x.flip(1), alpha=2),
        torch.sub(x, x.flip(1), alpha=0.5),
        torch.rsub(x, 1.5, alpha=3),
        torch.add(x, 1.0, alpha=2),
        torch.sub(x, 1.0, alpha=2),
        torch.ops.aten.rsub.Tensor(x, x.flip(1), alpha=2),
    ),
    "powers": lambda x: (x**2, x.abs() ** 0.5, (x.abs() + 1) ** x, 2.0**x, x**3, whole(x) ** 2),
    "compare": lambda x: tuple(getattr(torch, name)(x, y) for name in COMPARE for y in (0.25, x.flip(1))),
    "rounding modes": lambda x: (
        torch.div(x, 0.3, rounding_mode="floor"),
        torch.div(x, 0.3, rounding_mode="trunc"),
        torch.div(whole(x), 3, rounding_mode="floor"),
        torch.floor_divide(x, 0.7),
        torch.round(x, decimals=2),
    ),
    "types of scalars": lambda x: (
        whole(x) + 0.5,
        whole(x) * 0.25,
        whole(x) / 2,
        whole(x) > 0.5,
        0.5 - whole(x),
        whole(x) + x,
        (x > 0) * x,
        torch.where(x > 0, whole(x), x),
        torch.where(x > 0, 1.5, 0.0),
        whole(x) * (x > 0),
    ),
    "logic": lambda x: (
        torch.logical_and(x > 0, x < 1),
        torch.logical_or(x > 1, x < 0),
        torch.logical_xor(x > 0, x < 1),
        (x > 0) & (x < 1),
        whole(x) | 1,
        whole(x) & 6,
        whole(x) ^ 3,
        whole(x) & whole(x.flip(1)),
        whole(x) | whole(x.flip(1)),
        whole(x) ^ whole(x.flip(1)),
    ),
    "activations": lambda x: (
        F.elu(x, 0.7),
        F.celu(x, 1.5),
        F.selu(x),
        F.gelu(x),
        F.gelu(x, approximate="tanh"),
        F.hardtanh(x, -0.5, 0.7),
        F.relu6(x * 5),
        F.leaky_relu(x, 0.3),
        F.rrelu(x, 0.1, 0.5),
        F.softplus(x, 2.0, 3.0),
        F.hardswish(x),
        F.hardsigmoid(x),
        F.mish(x),
        F.softsign(x),
        F.softshrink(x, 0.3),
        F.hardshrink(x, 0.3),
        F.threshold(x, 0.1, 20.0),
        F.logsigmoid(x),
        F.tanhshrink(x),
        F.glu(x, 1),
    ),
    "clamp": lambda x: (
        x.clamp(-0.5, 0.5),
        x.clamp(max=0.3),
        x.clamp(min=0.3),
        torch.clamp_max(x, 0.1),
        torch.clamp_min(x, -0.1),
        torch.clamp(x, x.flip(1) - 1, x.flip(1) + 1),
        whole(x).clamp(-1, 2),
        whole(x).clamp(min=1),
        (x > 0).sum(1).clamp(max=2),
        whole(x).clamp(min=0.5),
    ),
    "softmax": lambda x: (
        torch.softmax(x, 1),
        torch.log_softmax(x, -1),
        F.softmin(x, 2),
        torch.logsumexp(x, (1, 3)),
    ),
    "reductions": lambda x: (
        x.amax((1, 2)),
        x.amin(3, keepdim=True),
        x.flatten(1).max(1)[0],
        x.flatten(1).min(1, keepdim=True)[0],
        x.max(2)[1],
        x.min(2)[1],
        x.argmax(1),
        x.argmin(-1, keepdim=True),
        x.mean((2, 3)),
        x.mean(),
        x.sum((1, 2), keepdim=True),
        x.sum(),
        x.sum((), dtype=torch.float32),
        whole(x).sum(1),
        x.max(),
        x.min(),
        x.std(1),
        x.std((1, 2), correction=0),
        x.var((2, 3), unbiased=False),
        x.var(1, keepdim=True),
        x.norm(dim=1),
        torch.linalg.vector_norm(x, 1, (1, 2)),
        torch.linalg.vector_norm(x, math.inf, 1),
        F.normalize(x),
        (x > 1).any(1),
        x.any(2),
        (x > -3).all(3),
        torch.std_mean(x, 1)[1],
        x.mean(0)[0, 0].prod(),
    ),
    "sums of whole numbers": lambda x: (
        whole(x).cumsum(1),
        whole(x).int().cumsum(-1),
        (x > 0).cumsum(2),
        whole(x).int().cumsum(1, dtype=torch.float32),
        whole(x).int().cumprod(1),
        whole(x).int().prod(1),
        (x > 0).prod(2),
        whole(x).int().sum(1),
        (x > 0).sum((1, 2)),
        # places of tokens, as RoBERTa counts them
        ((x > 0).int().cumsum(1).type_as(whole(x)) + 1) * (x > 0).int(),
    ),
    "truth values": lambda x: (
        (x > 0) * (x > -1),
        (x > 0) + (x > 1),
        torch.maximum(x > 0, x.flip(1) > 0),
        torch.minimum(x > 0, x.flip(1) > 0),
        (x > 0) == (x.flip(1) > 0),
        (x > 0) < (x.flip(1) > 0),
        (x > 0) & True,
        (x > 0) == True,  # noqa: E712
    ),
    "functions of whole numbers": lambda x: tuple(
        function(whole(x).abs().to(kind) + 1)
        for kind in (torch.int32, torch.int64)
        for function in (
            torch.exp,
            torch.log,
            torch.sqrt,
            torch.rsqrt,
            torch.sin,
            torch.cos,
            torch.tanh,
            torch.sigmoid,
            torch.reciprocal,
        )
    ),
    "order": lambda x: (
        x.cumsum(1),
        x.sort(1)[0],
        x.sort(3, descending=True)[1],
        x.topk(2, 1)[0],
        x.topk(3, 3, largest=False)[1],
    ),
    "places": lambda x: (
        x[:, -1],
        x.select(-1, -2),
        x[:, 1],
        x[:, -2:],
        x[:, :-1, 1:],
        x[:, :, ::2],
        x[:, 1:100],
        x[:, -100:2],
        x.narrow(2, -3, 2),
        x.chunk(3, 2)[1],
        x.split(4, 3)[1],
        x.split([1, 3], 1)[1],
        x.unbind(1)[-1],
        x.tensor_split(4, 2)[3],
    ),
    "borders": lambda x: (
        torch.bucketize(torch.round(x * 4) / 4, torch.tensor([-0.5, 0.25, 0.5]), right=True),
        torch.bucketize(torch.round(x * 4) / 4, torch.tensor([-0.5, 0.25, 0.5])),
        torch.tensor([0.0, 0.2, 0.3, 0.7])[torch.bucketize(x, torch.tensor([-0.5, 0.25, 0.5]), right=True)],
    ),
    "index": lambda x: (
        x[:, ROWS],
        x[:, ROWS, COLUMNS],
        x[:, :, ROWS, COLUMNS],
        x[:, ROWS, :, COLUMNS],
        x[:, ROWS.unsqueeze(1), COLUMNS],
        x.index_select(2, ROWS.abs()),
        x[:, whole(x.mean(0)[0, 0, :2]) % 4 - 4],
        x.gather(1, x.argmax(1, keepdim=True)),
    ),
    "scatter": lambda x: (
        x.scatter(1, x.argmax(1, keepdim=True), 0.5),
        x.scatter(1, x.argmax(1, keepdim=True), x[:, :1]),
        torch.where(x < 0, x, 0.5).index_put((x > 0,), torch.tensor(3.0)),
        x.index_put((torch.tensor([0]), torch.tensor([2])), torch.tensor(3.0)),
        _slices(x),
    ),
    "shape": lambda x: (
        x.permute(0, 2, 3, 1),
        x.transpose(1, -1),
        x.reshape(x.shape[0], -1, 3),
        x.flatten(1).unflatten(1, (4, -1)),
        x.unsqueeze(-1).squeeze(-1),
        x[:, :1].squeeze(1),
        x[:, :2].squeeze(1),
        x[:, :1].expand(-1, 4, -1, -1),
        x.repeat(1, 2, 1, 1),
        x.repeat_interleave(2, 2),
        torch.cat([x, x.flip(1, 2)], 1),
        torch.stack([x, x], 1),
        x.roll((1, -2), (2, 3)),
        x.tril(1),
        x.triu(-1),
        x.diagonal(0, 2, 3),
        x.diagonal(1, 2, 3),
        x.rot90(1, (2, 3)),
        x.unfold(2, 3, 2),
        x.view(-1, 2, 2, 6, 6).mean(1),
        F.unfold(x, 3, 2, 1, 2),
        F.pixel_shuffle(x, 2),
        F.pixel_unshuffle(x, 3),
        F.channel_shuffle(x, 2),
    ),
    "made": lambda x: (
        _filled(x),
        torch.zeros_like(x) + torch.arange(6),
        torch.full_like(x, 2.5),
        torch.ones(x.shape[0], 3),
        x.new_zeros((x.shape[0], 2)),
        x.to(torch.int32),
        x.to(torch.float64),
        torch.linspace(0, 1, 6) + x,
        torch.eye(6) @ x,
        F.one_hot(whole(x[:, 0]) % 5, 5),
        F.embedding(whole(x[:, 0, 0]) % 4, TABLE),
        torch.cat([x.new_full((x.shape[0], 1), 2.0), x.flatten(1)], 1),
    ),
    "constant padding": lambda x: (
        F.pad(x, (1, 2)),
        F.pad(x, (0, 1, 2, 0), value=-1.5),
        F.pad(x, (-1, 2, 1, -2)),
    ),
    "padding by repetition": lambda x: (
        F.pad(x, (1, 2, 3, 0), mode="circular"),
        F.pad(x, (1, 2, 3, 0), mode="reflect"),
        F.pad(x, (1, 2, 3, 0), mode="replicate"),
        F.pad(x.flatten(2), (5, 4), mode="reflect"),
        F.pad(x.unsqueeze(2), (1, 1, 1, 1, 1, 1), mode="replicate"),
    ),
    "nearest": lambda x: (
        F.interpolate(x, scale_factor=1.7),
        F.interpolate(x, scale_factor=2.0),
        F.interpolate(x, scale_factor=(1.0, 0.6)),
        F.interpolate(x, size=(7, 15)),
        F.interpolate(x, size=(7, 3), mode="nearest-exact"),
        F.interpolate(x, scale_factor=3.3, mode="nearest-exact"),
        F.interpolate(x.flatten(2), size=50),
        F.interpolate(x.unsqueeze(2), scale_factor=(2, 1.5, 1)),
    ),
    "bilinear": lambda x: (
        F.interpolate(x, scale_factor=1.7, mode="bilinear"),
        F.interpolate(x, scale_factor=1.7, mode="bilinear", recompute_scale_factor=True),
        F.interpolate(x, size=(7, 9), mode="bilinear", align_corners=True),
        F.interpolate(x, size=(1, 4), mode="bilinear", align_corners=True),
        F.interpolate(x, scale_factor=2, mode="bilinear"),
        F.interpolate(x, size=(3, 4), mode="bilinear", antialias=True),
        F.interpolate(x, size=(9, 4), mode="bilinear", antialias=True, align_corners=True),
        F.interpolate(x, scale_factor=0.6, mode="bilinear", antialias=True),
        F.interpolate(x.flatten(2), size=17, mode="linear"),
        F.interpolate(x.unsqueeze(2), size=(3, 4, 5), mode="trilinear"),
    ),
    "bicubic": lambda x: (
        F.interpolate(x, size=(7, 9), mode="bicubic"),
        F.interpolate(x, scale_factor=1.7, mode="bicubic"),
        F.interpolate(x, size=(7, 9), mode="bicubic", align_corners=True),
        F.interpolate(x, size=(3, 4), mode="bicubic", antialias=True),
        F.interpolate(x, size=(13, 4), mode="bicubic", antialias=True),
    ),
    "area": lambda x: F.interpolate(x, size=(4, 5), mode="area"),
    "products": lambda x: (
        x @ x.transpose(2, 3),
        torch.einsum("nchw,ncvw->nhv", x, x),
        x.flatten(1) @ torch.linspace(-1, 1, 144 * 3).reshape(144, 3),
        torch.addmm(torch.ones(3), x.flatten(1)[:, :4], TABLE[:, :3], beta=0.5, alpha=2.0),
        torch.baddbmm(x[:, 0], x[:, 1], x[:, 2], beta=0.5, alpha=2.0),
        x[:, 0] * torch.linspace(0, 1, 6).outer(torch.ones(6)),
    ),
    "attention": lambda x: (
        _attend(x),
        _attend(x, is_causal=True),
        _attend(x, scale=0.3),
        _attend(x, attn_mask=torch.ones(6, 6, dtype=torch.bool).tril()),
        _attend(x, attn_mask=torch.ones(6, 6, dtype=torch.bool).tril(-1)),
        _attend(x, attn_mask=torch.linspace(-2, 2, 36).reshape(6, 6)),
        _attend(x, attn_mask=x > -0.5),
        F.scaled_dot_product_attention(x, x[:, :2], x[:, 2:], enable_gqa=True),
    ),
    "batch": lambda x: (
        x / x.shape[0],
        x * x.numel() - x.shape[0],
        x > x.shape[0] - 4,
        TABLE.repeat(x.shape[0], 2),
        x[:, :1].repeat(x.shape[0], 4, 1, 1)[: x.shape[0]],
        x[-1:].expand(x.shape[0], -1, -1, -1),
        x.flip(0),
        x + x[-1],
        x[torch.arange(x.shape[0]), 1],
    ),
    **{f"{name}-rewritten": function for name, function in REWRITTEN.items()},
}
