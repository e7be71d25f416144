"""Specifications of what has no weight: pooling, sums, concatenation, moving and converting tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tvm_backend.kernels.spec.values import (
    Epilogue,
    QParams,
    TensorKind,
    check_batch,
    check_kind,
    check_positive,
    require,
)

__all__ = ["ConcatSpec", "DequantizeSpec", "ElementwiseSpec", "PoolSpec", "QuantizeSpec", "SubsampleSpec"]


@dataclass(frozen=True)
class PoolSpec:
    """Pooling over windows of (N, H, W, C) integers; arguments: data, residual if any, outputs.

    ``max`` takes the largest integer (padded places never win) and dequantizes it.  ``avg`` sums
    ``q - zero_point`` exactly in int32 and multiplies by ``float32(scale / divisor)``; the divisor is the window's
    size, or the number of its places inside the input (and inside the padding, with ``count_include_pad``).
    The value then goes through the epilogue.  The global average is an ``avg`` whose window is the whole input.

    Parameters
    ----------
    kind : {"max", "avg"}
        What is taken over each window.
    batch : int or None
        Batch size; None makes it a run-time value.
    height, width, channels : int
        Size of the input.
    kernel, stride : tuple of int
        Vertical, then horizontal.
    input : QParams
        How the data are quantized.
    epilogue : Epilogue
        What is made of the value; without a clip and with ``outputs == (input,)`` max pooling is integers only.
    padding : tuple of int
        (top, left, bottom, right).
    ceil_mode, count_include_pad : bool
        As in torch.
    """

    kind: Literal["max", "avg"]
    batch: int | None
    height: int
    width: int
    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    input: QParams
    epilogue: Epilogue
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    ceil_mode: bool = False
    count_include_pad: bool = True

    def __post_init__(self) -> None:
        require(self.kind in ("max", "avg"), f"pooling is 'max' or 'avg', not {self.kind!r}")
        check_batch(self.batch)
        check_positive(self, "height", "width", "channels", "kernel", "stride")
        require(
            len(self.padding) == 4 and min(self.padding) >= 0,
            f"padding must be four numbers (top, left, bottom, right) of at least 0, not {self.padding!r}",
        )
        top, left, bottom, right = self.padding
        require(
            max(top, bottom) < self.kernel[0] and max(left, right) < self.kernel[1],
            f"padding {self.padding} must be smaller than the window {self.kernel}: a window would lie outside",
        )
        require(
            self.out_height >= 1 and self.out_width >= 1,
            f"a {self.kernel} window does not fit into a {self.height} x {self.width} input",
        )

    def _extent(self, size: int, kernel: int, stride: int, before: int, after: int) -> int:
        room = size + before + after - kernel
        count = (-(-room // stride) if self.ceil_mode else room // stride) + 1
        # As torch: the last window must start inside the input or the padding in front of it.
        if self.ceil_mode and (count - 1) * stride >= size + before:
            count -= 1
        return count

    @property
    def out_height(self) -> int:
        """Rows of the output."""
        return self._extent(self.height, self.kernel[0], self.stride[0], self.padding[0], self.padding[2])

    @property
    def out_width(self) -> int:
        """Columns of the output."""
        return self._extent(self.width, self.kernel[1], self.stride[1], self.padding[1], self.padding[3])


@dataclass(frozen=True)
class ElementwiseSpec:
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


@dataclass(frozen=True)
class ConcatSpec:
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


@dataclass(frozen=True)
class SubsampleSpec:
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


@dataclass(frozen=True)
class QuantizeSpec:
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


@dataclass(frozen=True)
class DequantizeSpec:
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
