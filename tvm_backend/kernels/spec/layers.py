"""Specifications of the layers with a weight: convolution and linear."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from tvm_backend.kernels.spec.base import WeightedSpec
from tvm_backend.kernels.spec.values import Epilogue, QParams, check_batch, check_positive, require

__all__ = ["ConvSpec", "LinearSpec"]


@dataclass(frozen=True)
class ConvSpec(WeightedSpec):
    """A two-dimensional convolution on (N, H, W, C) integers.

    Kernel arguments: data, packed weight, int32 compensation (C_out,), float32 scale (C_out,), float32 bias (C_out,),
    residual if any, outputs of shape (N, H_out, W_out, C_out).

    Parameters
    ----------
    batch : int or None
        Batch size; None makes it a run-time value.
    height, width : int
        Size of the input.
    in_channels, out_channels : int
        Channels, over all groups.
    kernel, stride, dilation : tuple of int
        Vertical, then horizontal.
    padding : tuple of int
        (top, left, bottom, right); padded places hold real zero, that is the input's zero point.
    groups : int
        1, or ``in_channels`` for a depthwise convolution, or any common divisor of the channels.
    input : QParams
        How the data are quantized.
    weight_bits : int
        As for :class:`~tvm_backend.kernels.spec.WeightedSpec`.
    epilogue : Epilogue
        What is made of the sums.
    """

    operation: ClassVar[str] = "conv"

    batch: int | None
    height: int
    width: int
    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    input: QParams
    epilogue: Epilogue
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    weight_bits: int = 8

    def __post_init__(self) -> None:
        check_batch(self.batch)
        check_positive(
            self, "height", "width", "in_channels", "out_channels", "kernel", "stride", "dilation", "groups"
        )
        require(
            len(self.padding) == 4 and min(self.padding) >= 0,
            f"padding must be four numbers (top, left, bottom, right) of at least 0, not {self.padding!r}",
        )
        require(
            self.in_channels % self.groups == 0 and self.out_channels % self.groups == 0,
            f"{self.in_channels} -> {self.out_channels} channels cannot be split into {self.groups} groups",
        )
        require(2 <= self.weight_bits <= 8, f"weights have 2 to 8 bits, not {self.weight_bits}")
        require(
            self.out_height >= 1 and self.out_width >= 1,
            f"a {self.kernel} kernel does not fit into a {self.height} x {self.width} input",
        )

    @property
    def name(self) -> str:
        """What it computes: kernel and channels."""
        kernel = f"{self.kernel[0]}x{self.kernel[1]}"
        if self.depthwise:
            return f"depthwise_{kernel}_{self.in_channels}"
        return f"conv2d_{kernel}_{self.in_channels}_{self.out_channels}"

    @property
    def out_height(self) -> int:
        """Rows of the output."""
        reach = self.dilation[0] * (self.kernel[0] - 1) + 1
        return (self.height + self.padding[0] + self.padding[2] - reach) // self.stride[0] + 1

    @property
    def out_width(self) -> int:
        """Columns of the output."""
        reach = self.dilation[1] * (self.kernel[1] - 1) + 1
        return (self.width + self.padding[1] + self.padding[3] - reach) // self.stride[1] + 1

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the input."""
        return (self.height, self.width, self.in_channels)

    @property
    def out_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the output."""
        return (self.out_height, self.out_width, self.out_channels)

    @property
    def depthwise(self) -> bool:
        """Whether each of several input channels is convolved on its own, giving one output channel."""
        return 1 < self.groups == self.in_channels == self.out_channels

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Shape of the unpacked weight, (C_out, C_in / groups, kernel height, kernel width)."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations for one sample."""
        return math.prod(self.weight_shape) * self.out_height * self.out_width


@dataclass(frozen=True)
class LinearSpec(WeightedSpec):
    """A fully connected layer on (N, C) integers.

    Kernel arguments: data (N, C_in), packed weight, int32 compensation, float32 scale, float32 bias (C_out,),
    residual if any, outputs (N, C_out).  The unpacked weight has shape (C_out, C_in).

    Parameters
    ----------
    batch : int or None
        Rows; None makes it a run-time value.
    in_features, out_features : int
        Size of a row before and after.
    input : QParams
        How the data are quantized.
    epilogue : Epilogue
        What is made of the sums.
    weight_bits : int
        As for :class:`~tvm_backend.kernels.spec.WeightedSpec`.
    """

    operation: ClassVar[str] = "linear"

    batch: int | None
    in_features: int
    out_features: int
    input: QParams
    epilogue: Epilogue
    weight_bits: int = 8

    def __post_init__(self) -> None:
        check_batch(self.batch)
        check_positive(self, "in_features", "out_features")
        require(2 <= self.weight_bits <= 8, f"weights have 2 to 8 bits, not {self.weight_bits}")

    @property
    def name(self) -> str:
        """What it computes: features in and out."""
        return f"linear_{self.in_features}_{self.out_features}"

    @property
    def in_shape(self) -> tuple[int]:
        """Shape of an input row."""
        return (self.in_features,)

    @property
    def out_shape(self) -> tuple[int]:
        """Shape of an output row."""
        return (self.out_features,)

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Shape of the unpacked weight, (C_out, C_in)."""
        return (self.out_features, self.in_features)

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations for one row."""
        return self.in_features * self.out_features
