"""Small quantized models written out by hand, as PT2E QDQ graphs, for the tests of the TVM backend.

Every module computes with explicit ``torch.ops.quantized_decomposed`` ops on integer weights, so that exporting it gives the
graph that the backend is meant to read.  Scales are taken from one pass over random data.
"""

from __future__ import annotations

import torch
from torch import nn

from cat_plugin.torch_compat import register_quantized_decomposed

register_quantized_decomposed()
qd = torch.ops.quantized_decomposed


class Quantize(nn.Module):
    """Quantize and dequantize per tensor; the first call in observing mode chooses scale and zero point."""

    def __init__(self, bits: int, signed: bool = False) -> None:
        super().__init__()
        self.qmin, self.qmax = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        self.dtype = torch.int8 if signed else torch.uint8
        self.scale: float | None = None
        self.zero_point = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale is None:
            low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
            if self.qmax <= 3:  # at 2 bits the range of the tails would leave nothing of the rest
                low, high = 0.5 * low, 0.5 * high
            self.scale = max((high - low) / (self.qmax - self.qmin), 1e-6)
            self.zero_point = int(min(max(round(self.qmin - low / self.scale), self.qmin), self.qmax))
        args = (self.scale, self.zero_point, self.qmin, self.qmax, self.dtype)
        return qd.dequantize_per_tensor(qd.quantize_per_tensor(x, *args), *args)


class QWeight(nn.Module):
    """An integer weight with one scale per output channel."""

    def __init__(self, weight: torch.Tensor, bits: int, per_tensor: bool = False) -> None:
        super().__init__()
        self.qmin, self.qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        flat = weight.detach().flatten(1)
        scale = flat.abs().amax(1).clamp_min(1e-6) / max(self.qmax, 1)
        if bits == 2:
            scale = 1.2 * flat.abs().mean(1)
        if per_tensor:
            scale = scale.max().expand_as(scale).clone()
        shape = [-1] + [1] * (weight.ndim - 1)
        q = torch.clamp(torch.round(weight.detach() / scale.reshape(shape)), self.qmin, self.qmax)
        self.per_tensor = float(scale[0]) if per_tensor else None
        self.register_buffer("q", q.to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.zeros(len(scale), dtype=torch.int64))

    def forward(self) -> torch.Tensor:
        if self.per_tensor is not None:
            return qd.dequantize_per_tensor(self.q, self.per_tensor, 0, self.qmin, self.qmax, torch.int8)
        return qd.dequantize_per_channel(
            self.q, self.scale, self.zero_point, 0, self.qmin, self.qmax, torch.int8
        )


class QConv(nn.Module):
    """A quantized convolution, one- or two-dimensional, on input that is quantized already."""

    def __init__(self, conv: nn.Conv2d | nn.Conv1d, bits: int) -> None:
        super().__init__()
        self.weight = QWeight(conv.weight, bits)
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone())
        self.stride, self.padding, self.dilation, self.groups = (
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
        )
        self.function = nn.functional.conv2d if isinstance(conv, nn.Conv2d) else nn.functional.conv1d

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(
            x, self.weight(), self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class QLinear(nn.Module):
    """A quantized linear layer on input that is quantized already."""

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        self.weight = QWeight(linear.weight, bits)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight(), self.bias)


class QBlock(nn.Module):
    """A residual block.  One float tensor feeds two quantizers: ``bits`` for the convolution, 8 for the shortcut.

    ``shortcut`` is "identity", "conv" (a 1x1 convolution) or "pad" (stride-2 slice and zero channels).  With
    ``quantize_branch`` the convolution's result is quantized to 8 bits before the addition.
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        stride: int,
        bits: int,
        shortcut: str = "identity",
        quantize_branch: bool = True,
    ) -> None:
        super().__init__()
        self.conv1 = QConv(nn.Conv2d(cin, cout, 3, stride, 1), bits)
        self.conv2 = QConv(nn.Conv2d(cout, cout, 3, 1, 1), bits)
        self.q_in, self.q_mid, self.q_skip = Quantize(bits), Quantize(bits), Quantize(8)
        self.q_branch = Quantize(8, signed=True) if quantize_branch else nn.Identity()
        self.shortcut, self.extra = shortcut, cout - cin
        if shortcut == "conv":
            self.down, self.q_down = QConv(nn.Conv2d(cin, cout, 1, stride), bits), Quantize(8, signed=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.q_in(x)
        out = self.q_mid(torch.relu(self.conv1(low)))
        out = self.q_branch(self.conv2(out))
        if self.shortcut == "identity":
            skip = self.q_skip(x)
        elif self.shortcut == "conv":
            skip = self.q_down(self.down(low))
        else:
            before = self.extra // 2
            skip = self.q_skip(x)[:, :, ::2, ::2]
            skip = nn.functional.pad(skip, (0, 0, 0, 0, before, self.extra - before))
        return torch.relu(out + skip)


class ClusterAffineStep(nn.Module):
    """The paper's step as one op call, with random parameters."""

    def __init__(self, classes: int, clusters: int = 4, components: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        rand = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        self.register_buffer("mean", rand(classes))
        self.register_buffer("components", torch.linalg.qr(rand(classes, components))[0].T.contiguous())
        self.register_buffer("centroids", rand(clusters, components or classes))
        self.register_buffer("gamma", 1 + 0.1 * rand(clusters, classes))
        self.register_buffer("beta", 0.1 * rand(clusters, classes))
        self.alpha = 0.4

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return torch.ops.cat.cluster_affine(
            z, self.mean, self.components, self.centroids, self.gamma, self.beta, self.alpha
        )


class QResNet(nn.Module):
    """A ResNet of three stages: first and last layer at 8 bits, the others at ``bits``."""

    def __init__(
        self,
        bits: int = 4,
        shortcut: str = "pad",
        width: int = 16,
        classes: int = 10,
        channels: int = 3,
        affine: bool = True,
        quantize_branch: bool = True,
    ) -> None:
        super().__init__()
        self.q_input = Quantize(8, signed=True)
        self.stem = QConv(nn.Conv2d(channels, width, 3, 1, 1), 8)
        self.blocks = nn.Sequential(
            QBlock(width, width, 1, bits, "identity", quantize_branch),
            QBlock(width, 2 * width, 2, bits, shortcut, quantize_branch),
            QBlock(2 * width, 4 * width, 2, bits, shortcut, quantize_branch),
        )
        self.q_pool, self.q_features = Quantize(8), Quantize(8)
        self.fc = QLinear(nn.Linear(4 * width, classes), 8)
        self.affine = ClusterAffineStep(classes) if affine else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(self.q_input(x)))
        x = self.q_pool(self.blocks(x))
        x = nn.functional.adaptive_avg_pool2d(x, 1)
        x = self.q_features(torch.flatten(x, 1))
        return self.affine(self.fc(x))


def calibrated(model: nn.Module, example: torch.Tensor) -> nn.Module:
    """Run ``model`` once so that its quantizers choose their scales, and return it in eval mode."""
    model.eval()
    with torch.no_grad():
        model(example)
    return model


def exported(model: nn.Module, example: torch.Tensor, dynamic: bool = True) -> torch.export.ExportedProgram:
    """Calibrate and export, by default with a dynamic batch."""
    calibrated(model, example)
    shapes = {0: torch.export.Dim("batch", min=1, max=4096)} if dynamic else None
    return torch.export.export(model, (example,), dynamic_shapes=(shapes,) if dynamic else None)
