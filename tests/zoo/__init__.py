"""Tiny whole networks in the idioms that people use, seeded, written for these tests.

Each is small enough to be traced, quantized and compiled in seconds, and each holds what its large namesake is known for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.zoo import attention, dense, language, mobile, residual, sequence

__all__ = ["ZOO", "Network"]

_IMAGE, _SEQUENCE = (3, 16, 16), (20, 6)


@dataclass(frozen=True)
class Network:
    """One network of the zoo.

    Attributes
    ----------
    make : callable
        Its class.
    shape : tuple of int
        Of one input, without the batch axis.
    words : int or None
        Inputs are integers below this; None for real numbers.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = _IMAGE
    words: int | None = None

    def build(self) -> nn.Module:
        """The same weights at every call, in evaluation mode, with running statistics that are not the identity's."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.make().eval()
            for module in model.modules():
                if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                    module.running_mean.uniform_(-0.3, 0.3)  # type: ignore[union-attr]
                    module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
                    nn.init.uniform_(module.weight, 0.6, 1.4)
                    nn.init.uniform_(module.bias, -0.2, 0.2)
        return model

    def inputs(self, count: int, seed: int = 1) -> Tensor:
        """(count, ...) inputs."""
        generator = torch.Generator().manual_seed(seed)
        if self.words is not None:
            return torch.randint(self.words, (count, *self.shape), generator=generator)
        return torch.randn(count, *self.shape, generator=generator)


ZOO: dict[str, Network] = {
    "se-resnet": Network(residual.SeResNet),
    "regnet": Network(residual.RegNet),
    "res2net": Network(residual.Res2Net),
    "repvgg": Network(residual.RepVgg),
    "densenet": Network(residual.DenseNet),
    "c2f": Network(residual.CspNet),
    "mobilenet-v3": Network(mobile.MobileNetV3),
    "shufflenet": Network(mobile.ShuffleNet),
    "ghostnet": Network(mobile.GhostNet),
    "inception": Network(mobile.Inception),
    "convnext": Network(mobile.ConvNeXt),
    "vit": Network(attention.VisionTransformer),
    "vit-mha": Network(attention.VisionTransformerMha),
    "cct": Network(attention.Cct),
    "swin": Network(attention.SwinTransformer),
    "mixer": Network(attention.Mixer),
    "unet": Network(dense.UNet),
    "fpn": Network(dense.Fpn),
    "pointnet": Network(dense.PointNet, (3, 24)),
    "lstm": Network(sequence.Lstm, _SEQUENCE),
    "gru": Network(sequence.Gru, _SEQUENCE),
    "tcn": Network(sequence.Tcn, _SEQUENCE),
    "wavenet": Network(sequence.WaveNet, _SEQUENCE),
    "text-cnn": Network(sequence.TextCnn, (12,), words=50),
    "encoder": Network(language.Encoder, (12,), words=50),
    "llama": Network(language.Llama, (12,), words=50),
}
