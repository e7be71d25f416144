"""What a kernel computes, written down as data.

A specification says everything that the arithmetic of an integer kernel depends on: shapes, quantization
parameters, activation, further inputs and outputs.  It is frozen and hashable, so that equal layers share a
kernel, and checks itself, so that a kernel never sees what it cannot compute.

All kernels use the same arithmetic, and equal their reference to the bit:

- activations are stored in 8 bits, channels last; a real value is ``(q - zero_point) * scale``;
- weights are integers with their zero point already subtracted;
- products are summed exactly in int32: ``acc = sum((q - zero_point) * w)``;
- the epilogue is float32: ``v = fma(float32(acc), scale[c], bias[c])``; a branch quantizes ``v`` as an integer output is
  and makes it ``float32(q - zero_point) * scale`` again; a residual ``r`` that is an integer tensor
  adds ``fma(float32(r - zero_point), scale, v)``, one that is float32 adds plainly; ``v`` is clipped;
- an integer output is ``clamp(rint(v * float32(1 / scale)) + zero_point, qmin, qmax)`` with ties to even, which is
  ``torch.ops.quantized_decomposed.quantize_per_tensor``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cat_plugin.errors import CompileError

__all__ = [
    "ConcatSpec",
    "ConvSpec",
    "DequantizeSpec",
    "ElementwiseSpec",
    "Epilogue",
    "KernelSpec",
    "LinearSpec",
    "PoolSpec",
    "QParams",
    "QuantizeSpec",
    "SubsampleSpec",
    "TensorKind",
]

_LIMITS = {"int8": (-128, 127), "uint8": (0, 255)}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise CompileError(message)


@dataclass(frozen=True)
class QParams:
    """Per-tensor affine quantization of an activation.

    Parameters
    ----------
    scale : float
        Step between two neighbouring values.
    zero_point : int
        The integer that stands for zero; it must be storable in `dtype`.
    qmin, qmax : int
        Smallest and largest integer in use: 0..3 for 2 bits unsigned, -8..7 for 4 bits signed.
    dtype : {"int8", "uint8"}
        How one value is stored.
    """

    scale: float
    zero_point: int
    qmin: int
    qmax: int
    dtype: Literal["int8", "uint8"]

    def __post_init__(self) -> None:
        _require(self.dtype in _LIMITS, f"activations are stored as int8 or uint8, not as {self.dtype!r}")
        low, high = _LIMITS[self.dtype]
        _require(
            math.isfinite(self.scale) and self.scale > 0,
            f"the scale of a quantized tensor is {self.scale}; it must be positive and finite",
        )
        _require(
            low <= self.qmin < self.qmax <= high,
            f"the quantized range {self.qmin}..{self.qmax} does not fit into {self.dtype}",
        )
        _require(
            low <= self.zero_point <= high,
            f"the zero point {self.zero_point} does not fit into {self.dtype}",
        )

    @property
    def signed(self) -> bool:
        """Whether the storage type is signed."""
        return self.dtype == "int8"

    @property
    def flipped(self) -> QParams:
        """The same values stored with the other sign: integers offset by 128, their highest bit turned."""
        shift = 128 if self.signed else -128
        return QParams(
            self.scale,
            self.zero_point + shift,
            self.qmin + shift,
            self.qmax + shift,
            "uint8" if self.signed else "int8",
        )

    @property
    def inverse(self) -> float:
        """``1 / scale`` rounded to float32, the factor that torch quantizes with."""
        return float(np.float32(1.0 / self.scale))

    @property
    def step(self) -> float:
        """The scale rounded to float32."""
        return float(np.float32(self.scale))


TensorKind = QParams | Literal["float32"]
"""What a tensor holds: integers with their parameters, or float32."""


def _check_kind(kind: object, what: str) -> None:
    _require(
        isinstance(kind, QParams) or kind == "float32",
        f"{what} must be QParams or 'float32', not {kind!r}",
    )


@dataclass(frozen=True)
class Epilogue:
    """What happens to a float32 value before it is stored.

    Parameters
    ----------
    clip : tuple of (float or None), optional
        Lower and upper bound of the activation function: ``(0.0, None)`` is ReLU, ``(0.0, 6.0)`` ReLU6.
    residual : QParams or "float32" or None, optional
        A further input of the output's shape, added before the clip.
    branch : QParams or None, optional
        The value is quantized and dequantized with these parameters before the residual is added: what a graph says
        that quantizes both summands of an addition.
    outputs : tuple of (QParams or "float32")
        What is stored; one value may be stored twice, for example at 2 bits for the next convolution and at
        8 bits for a shortcut.
    """

    clip: tuple[float | None, float | None] = (None, None)
    residual: TensorKind | None = None
    outputs: tuple[TensorKind, ...] = ("float32",)
    branch: QParams | None = None

    def __post_init__(self) -> None:
        _require(len(self.clip) == 2, f"clip must be a (lower, upper) pair, not {self.clip!r}")
        lower, upper = self.clip
        if lower is not None and upper is not None:
            _require(lower <= upper, f"the clip range {lower}..{upper} is empty")
        _require(len(self.outputs) >= 1, "a kernel needs at least one output")
        if self.residual is not None:
            _check_kind(self.residual, "the residual")
        _require(
            self.branch is None or isinstance(self.branch, QParams),
            f"the branch must be QParams or None, not {self.branch!r}",
        )
        for output in self.outputs:
            _check_kind(output, "an output")


def _positive(spec: object, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        for item in value if isinstance(value, tuple) else (value,):
            _require(
                isinstance(item, int) and item >= 1,
                f"{type(spec).__name__}.{name} must be positive, not {value!r}",
            )


def _check_batch(batch: int | None) -> None:
    _require(batch is None or batch >= 1, f"the batch size must be positive, or None for any, not {batch!r}")


@dataclass(frozen=True)
class ConvSpec:
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
        2 to 8: weights lie in ``-2**(bits-1) .. 2**(bits-1) - 1`` or, where an asymmetric zero point below 8 bits
        was folded, in any range of that many values inside int8.
    epilogue : Epilogue
        What is made of the sums.
    """

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
        _check_batch(self.batch)
        _positive(
            self, "height", "width", "in_channels", "out_channels", "kernel", "stride", "dilation", "groups"
        )
        _require(
            len(self.padding) == 4 and min(self.padding) >= 0,
            f"padding must be four numbers (top, left, bottom, right) of at least 0, not {self.padding!r}",
        )
        _require(
            self.in_channels % self.groups == 0 and self.out_channels % self.groups == 0,
            f"{self.in_channels} -> {self.out_channels} channels cannot be split into {self.groups} groups",
        )
        _require(2 <= self.weight_bits <= 8, f"weights have 2 to 8 bits, not {self.weight_bits}")
        _require(
            self.out_height >= 1 and self.out_width >= 1,
            f"a {self.kernel} kernel does not fit into a {self.height} x {self.width} input",
        )

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
        """Whether each input channel is convolved on its own, giving one output channel."""
        return self.groups == self.in_channels == self.out_channels

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Shape of the unpacked weight, (C_out, C_in / groups, kernel height, kernel width)."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations for one sample."""
        return math.prod(self.weight_shape) * self.out_height * self.out_width


@dataclass(frozen=True)
class LinearSpec:
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
        As for :class:`ConvSpec`.
    """

    batch: int | None
    in_features: int
    out_features: int
    input: QParams
    epilogue: Epilogue
    weight_bits: int = 8

    def __post_init__(self) -> None:
        _check_batch(self.batch)
        _positive(self, "in_features", "out_features")
        _require(2 <= self.weight_bits <= 8, f"weights have 2 to 8 bits, not {self.weight_bits}")

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
        _require(self.kind in ("max", "avg"), f"pooling is 'max' or 'avg', not {self.kind!r}")
        _check_batch(self.batch)
        _positive(self, "height", "width", "channels", "kernel", "stride")
        _require(
            len(self.padding) == 4 and min(self.padding) >= 0,
            f"padding must be four numbers (top, left, bottom, right) of at least 0, not {self.padding!r}",
        )
        top, left, bottom, right = self.padding
        _require(
            max(top, bottom) < self.kernel[0] and max(left, right) < self.kernel[1],
            f"padding {self.padding} must be smaller than the window {self.kernel}: a window would lie outside",
        )
        _require(
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
        _check_batch(self.batch)
        _positive(self, "shape")
        _require(len(self.inputs) in (1, 2), f"one or two inputs can be added, not {len(self.inputs)}")
        for kind in self.inputs:
            _check_kind(kind, "an input")
        _require(self.epilogue.residual is None, "a second summand is the second input, not a residual")


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
        _check_batch(self.batch)
        _positive(self, "shape", "channels")
        _require(
            len(self.inputs) == len(self.channels) >= 1,
            f"{len(self.inputs)} inputs do not go with {len(self.channels)} channel counts",
        )
        _require(self.epilogue.residual is None, "a concatenation has no residual")
        _require(self.epilogue.branch is None, "a concatenation has no branch")


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
        _check_batch(self.batch)
        _positive(self, "height", "width", "channels", "stride")
        _require(min(self.before, self.after) >= 0, "a number of padded channels is negative")

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
        _check_batch(self.batch)
        _positive(self, "shape")
        _require(len(self.outputs) >= 1, "quantization needs at least one output")
        _require(
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
        _check_batch(self.batch)
        _positive(self, "shape")
        _require(
            not self.to_channels_first or len(self.shape) == 3,
            f"channels can be moved first in (H, W, C) only, not in {self.shape!r}",
        )


KernelSpec = (
    ConvSpec
    | LinearSpec
    | PoolSpec
    | ElementwiseSpec
    | ConcatSpec
    | SubsampleSpec
    | QuantizeSpec
    | DequantizeSpec
)
"""Any specification that :func:`tvm_backend.kernels.registry.lower` takes."""
