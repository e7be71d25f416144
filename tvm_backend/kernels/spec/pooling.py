"""Specification of pooling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from tvm_backend.kernels.spec.base import EpilogueSpec, Operand
from tvm_backend.kernels.spec.values import Epilogue, QParams, check_batch, check_positive, require

__all__ = ["PoolSpec"]


@dataclass(frozen=True)
class PoolSpec(EpilogueSpec):
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

    operation: ClassVar[str] = "pool"

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

    @property
    def out_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the output."""
        return (self.out_height, self.out_width, self.channels)

    @property
    def name(self) -> str:
        """What it computes: kind, window and channels."""
        return f"{self.kind}_pool_{self.kernel[0]}x{self.kernel[1]}_{self.channels}"

    @property
    def reads(self) -> tuple[Operand, ...]:
        """The data, and the residual if there is one."""
        return (Operand("data", (self.height, self.width, self.channels), self.input), *self.residuals)

    def spans(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """First and past-last index inside the input of each window, along rows and along columns."""
        extents = (self.height, self.width)
        counts = (self.out_height, self.out_width)
        rows, columns = (
            [
                (
                    max(0, i * self.stride[axis] - self.padding[axis]),
                    min(extents[axis], i * self.stride[axis] - self.padding[axis] + self.kernel[axis]),
                )
                for i in range(counts[axis])
            ]
            for axis in range(2)
        )
        return rows, columns

    def divisors(self) -> NDArray[np.int64]:
        """What each window's sum is divided by, shape (H_out, W_out)."""
        if not self.count_include_pad:
            rows, columns = ([last - first for first, last in spans] for spans in self.spans())
            return np.outer(rows, columns)
        extents = (self.height, self.width)
        rows, columns = (
            [
                min(
                    self.kernel[axis],
                    extents[axis] + self.padding[axis] + self.padding[axis + 2] - i * self.stride[axis],
                )
                for i in range(count)
            ]
            for axis, count in enumerate((self.out_height, self.out_width))
        )
        return np.outer(rows, columns)
