"""Specifications of what has no weight: pooling, sums, concatenation, moving and converting tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from tvm_backend.kernels.spec.base import EpilogueSpec, KernelSpec, Operand
from tvm_backend.kernels.spec.values import (
    Epilogue,
    QParams,
    TensorKind,
    check_batch,
    check_kind,
    check_positive,
    require,
)

__all__ = ["ConcatSpec", "DequantizeSpec", "ElementwiseSpec", "QuantizeSpec", "SubsampleSpec"]


@dataclass(frozen=True)
class ElementwiseSpec(EpilogueSpec):
    """One or two tensors of the same shape, added, clipped and quantized; arguments: inputs, outputs.

    An integer input is dequantized, ``float32(q - zero_point) * scale`` for the first and an fma onto the sum for the
    second.  With one input this is a requantization.

    Parameters
    ----------
    batch : int or None
        Batch size; None makes it a run-time value.
    shape : tuple of int
        The other dimensions; any number of them.
    inputs : tuple of (QParams or "float32")
        One or two inputs.
    epilogue : Epilogue
        Clip and outputs; `residual` must be None.
    """

    operation: ClassVar[str] = "elementwise"

    batch: int | None
    shape: tuple[int, ...]
    inputs: tuple[TensorKind, ...]
    epilogue: Epilogue

    def __post_init__(self) -> None:
        check_batch(self.batch)
        check_positive(self, "shape")
        require(len(self.inputs) in (1, 2), f"one or two inputs can be added, not {len(self.inputs)}")
        for kind in self.inputs:
            check_kind(kind, "an input")
        require(self.epilogue.residual is None, "a second summand is the second input, not a residual")

    @property
    def name(self) -> str:
        """What it computes."""
        return "requantize" if len(self.inputs) == 1 else "add"

    @property
    def reads(self) -> tuple[Operand, ...]:
        """The inputs."""
        return tuple(Operand(f"input{i}", self.shape, kind) for i, kind in enumerate(self.inputs))

    @property
    def out_shape(self) -> tuple[int, ...]:
        """That of the inputs."""
        return self.shape


@dataclass(frozen=True)
class ConcatSpec(EpilogueSpec):
    """Concatenation along the last axis (channels) with requantization; arguments: inputs, outputs.

    Parameters
    ----------
    batch : int or None
        Batch size; None makes it a run-time value.
    shape : tuple of int
        The dimensions between batch and channels, (H, W) for images, () for rows.
    channels : tuple of int
        Channels of each input.
    inputs : tuple of QParams
        How each input is quantized.
    epilogue : Epilogue
        Clip and outputs; an input whose parameters equal an unclipped output's is copied.
    """

    operation: ClassVar[str] = "concat"

    batch: int | None
    shape: tuple[int, ...]
    channels: tuple[int, ...]
    inputs: tuple[QParams, ...]
    epilogue: Epilogue

    def __post_init__(self) -> None:
        check_batch(self.batch)
        check_positive(self, "shape", "channels")
        require(
            len(self.inputs) == len(self.channels) >= 1,
            f"{len(self.inputs)} inputs do not go with {len(self.channels)} channel counts",
        )
        require(self.epilogue.residual is None, "a concatenation has no residual")
        require(self.epilogue.branch is None, "a concatenation has no branch")

    @property
    def name(self) -> str:
        """What it computes."""
        return "concat"

    @property
    def reads(self) -> tuple[Operand, ...]:
        """The inputs."""
        pairs = zip(self.channels, self.inputs, strict=True)
        return tuple(
            Operand(f"input{i}", (*self.shape, channels), kind) for i, (channels, kind) in enumerate(pairs)
        )

    @property
    def out_shape(self) -> tuple[int, ...]:
        """That of the inputs, with the channels of all."""
        return (*self.shape, sum(self.channels))


@dataclass(frozen=True)
class SubsampleSpec(KernelSpec):
    """Every stride-th pixel with channels of zeros around it; arguments: data, output.

    This is the parameter-free shortcut of CIFAR ResNets (option A): ``x[:, ::s, ::s]`` padded with zero channels.

    Parameters
    ----------
    batch : int or None
        Batch size; None makes it a run-time value.
    height, width, channels : int
        Size of the (N, H, W, C) input.
    stride : tuple of int
        Vertical, then horizontal.
    before, after : int
        Channels of zeros in front of and behind the input's.
    input : QParams
        How the data are quantized; the output has the same parameters.
    """

    operation: ClassVar[str] = "subsample"

    batch: int | None
    height: int
    width: int
    channels: int
    stride: tuple[int, int]
    before: int
    after: int
    input: QParams

    def __post_init__(self) -> None:
        check_batch(self.batch)
        check_positive(self, "height", "width", "channels", "stride")
        require(min(self.before, self.after) >= 0, "a number of padded channels is negative")

    @property
    def out_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the output."""
        rows = -(-self.height // self.stride[0])
        columns = -(-self.width // self.stride[1])
        return (rows, columns, self.before + self.channels + self.after)

    @property
    def name(self) -> str:
        """What it computes."""
        return "subsample"

    @property
    def reads(self) -> tuple[Operand, ...]:
        """The data."""
        return (Operand("data", (self.height, self.width, self.channels), self.input),)

    @property
    def read_bytes(self) -> int:
        """As many as are written: the other pixels are skipped."""
        return math.prod(self.out_shape)

    @property
    def out_kinds(self) -> tuple[TensorKind, ...]:
        """That of the data."""
        return (self.input,)


@dataclass(frozen=True)
class QuantizeSpec(KernelSpec):
    """float32 to integers at the border of the integer part; arguments: data, outputs.

    Parameters
    ----------
    batch : int or None
        Batch size; None makes it a run-time value.
    shape : tuple of int
        The other dimensions of the input: (C, H, W) when `to_channels_last`, else any.
    outputs : tuple of QParams
        One or more quantizations of the same tensor.
    to_channels_last : bool
        Whether (N, C, H, W) becomes (N, H, W, C) on the way.
    """

    operation: ClassVar[str] = "quantize"

    batch: int | None
    shape: tuple[int, ...]
    outputs: tuple[QParams, ...]
    to_channels_last: bool = False

    def __post_init__(self) -> None:
        check_batch(self.batch)
        check_positive(self, "shape")
        require(len(self.outputs) >= 1, "quantization needs at least one output")
        require(
            not self.to_channels_last or len(self.shape) == 3,
            f"channels can be moved last in (C, H, W) only, not in {self.shape!r}",
        )

    @property
    def name(self) -> str:
        """What it computes."""
        return "quantize"

    @property
    def reads(self) -> tuple[Operand, ...]:
        """The data."""
        return (Operand("data", self.shape, "float32"),)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """That of the data, with the channels where they belong."""
        return (*self.shape[1:], self.shape[0]) if self.to_channels_last else self.shape

    @property
    def out_kinds(self) -> tuple[TensorKind, ...]:
        """The quantizations asked for."""
        return self.outputs


@dataclass(frozen=True)
class DequantizeSpec(KernelSpec):
    """Integers to ``float32(q - zero_point) * scale``; arguments: data, output.

    Parameters
    ----------
    batch : int or None
        Batch size; None makes it a run-time value.
    shape : tuple of int
        The other dimensions of the input: (H, W, C) when `to_channels_first`, else any.
    input : QParams
        How the data are quantized.
    to_channels_first : bool
        Whether (N, H, W, C) becomes (N, C, H, W) on the way.
    """

    operation: ClassVar[str] = "dequantize"

    batch: int | None
    shape: tuple[int, ...]
    input: QParams
    to_channels_first: bool = False

    def __post_init__(self) -> None:
        check_batch(self.batch)
        check_positive(self, "shape")
        require(
            not self.to_channels_first or len(self.shape) == 3,
            f"channels can be moved first in (H, W, C) only, not in {self.shape!r}",
        )

    @property
    def name(self) -> str:
        """What it computes."""
        return "dequantize"

    @property
    def reads(self) -> tuple[Operand, ...]:
        """The data."""
        return (Operand("data", self.shape, self.input),)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """That of the data, with the channels where they belong."""
        return (self.shape[-1], *self.shape[:-1]) if self.to_channels_first else self.shape

    @property
    def out_kinds(self) -> tuple[TensorKind, ...]:
        """Real values."""
        return ("float32",)
