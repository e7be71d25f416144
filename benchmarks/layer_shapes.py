"""The convolutions of the benchmark networks, each shape once, with how often it occurs.

Needs the standard library only, so that every peer's environment can read it.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["NETWORKS", "Layer"]


class Layer(NamedTuple):
    """A convolution on a square image.

    Attributes
    ----------
    count : int
        How often it occurs in the network.
    size : int
        Height and width of the input.
    inputs, outputs : int
        Channels.
    kernel, stride : int
        Both square.
    depthwise : bool
        Whether every channel is convolved on its own.
    asymmetric : bool
        Whether padding is at the right and bottom only, as TensorFlow pads at stride 2.
    """

    count: int
    size: int
    inputs: int
    outputs: int
    kernel: int = 1
    stride: int = 1
    depthwise: bool = False
    asymmetric: bool = False

    @property
    def groups(self) -> int:
        """Groups of the convolution."""
        return self.inputs if self.depthwise else 1

    @property
    def padding(self) -> tuple[int, int, int, int]:
        """Padding at the top, left, bottom and right."""
        around = self.kernel // 2
        return (0, 0, around, around) if self.asymmetric else (around, around, around, around)

    @property
    def out_size(self) -> int:
        """Height and width of the output."""
        return (self.size + self.padding[0] + self.padding[2] - self.kernel) // self.stride + 1

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations for one image."""
        return self.out_size**2 * self.outputs * self.inputs // self.groups * self.kernel**2

    @property
    def name(self) -> str:
        """A short description."""
        kind = "dw" if self.depthwise else f"{self.kernel}x{self.kernel}"
        return f"{self.size}x{self.size}x{self.inputs} {kind}/{self.stride} {self.outputs}"


def _mobilenet() -> tuple[Layer, ...]:
    layers: dict[Layer, int] = {}

    def add(*args: int, **kwargs: bool) -> None:
        layer = Layer(0, *args, **kwargs)
        layers[layer] = layers.get(layer, 0) + 1

    add(224, 3, 32, 3, 2, asymmetric=True)
    size, inputs = 112, 32
    for expand, outputs, repeat, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for i in range(repeat):
            step, hidden = (stride if i == 0 else 1), inputs * expand
            if expand > 1:
                add(size, inputs, hidden)
            add(size, hidden, hidden, 3, step, depthwise=True, asymmetric=step == 2)
            size //= step
            add(size, hidden, outputs)
            inputs = outputs
    add(size, inputs, 1280)
    return tuple(layer._replace(count=count) for layer, count in layers.items())


def _resnet50() -> tuple[Layer, ...]:
    layers: dict[Layer, int] = {}

    def add(*args: int) -> None:
        layer = Layer(0, *args)
        layers[layer] = layers.get(layer, 0) + 1

    add(224, 3, 64, 7, 2)
    size, inputs = 56, 64
    for width, repeat, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(repeat):
            step, outputs = (stride if i == 0 else 1), 4 * width
            if i == 0:
                add(size, inputs, outputs, 1, step)
            add(size, inputs, width)
            add(size, width, width, 3, step)
            size //= step
            add(size, width, outputs)
            inputs = outputs
    return tuple(layer._replace(count=count) for layer, count in layers.items())


NETWORKS: dict[str, tuple[Layer, ...]] = {
    "ResNet-20": (
        Layer(1, 32, 3, 16, 3),
        Layer(6, 32, 16, 16, 3),
        Layer(1, 32, 16, 32, 3, 2),
        Layer(5, 16, 32, 32, 3),
        Layer(1, 16, 32, 64, 3, 2),
        Layer(5, 8, 64, 64, 3),
    ),
    "ResNet-18": (
        Layer(1, 224, 3, 64, 7, 2),
        Layer(4, 56, 64, 64, 3),
        Layer(1, 56, 64, 128, 3, 2),
        Layer(3, 28, 128, 128, 3),
        Layer(1, 56, 64, 128, 1, 2),
        Layer(1, 28, 128, 256, 3, 2),
        Layer(3, 14, 256, 256, 3),
        Layer(1, 28, 128, 256, 1, 2),
        Layer(1, 14, 256, 512, 3, 2),
        Layer(3, 7, 512, 512, 3),
        Layer(1, 14, 256, 512, 1, 2),
    ),
    "ResNet-50": _resnet50(),
    "MobileNetV2": _mobilenet(),
}
"""Networks at their usual input size."""
