"""Copies of input rows with their padding filled in, so that inner loops need no bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm_backend.kernels import tir
from tvm_backend.kernels.cpu import ir
from tvm_backend.kernels.spec import ConvSpec
from tvm_backend.kernels.tir import Expr

__all__ = ["Window"]

_SLACK = 64
"""Bytes behind the last row that vector loads may touch; they meet zero weights or are not stored."""


@dataclass(frozen=True)
class Window:
    """A buffer that holds the input rows of `rows` output rows.

    Parameters
    ----------
    spec : ConvSpec
        The convolution.
    rows : int
        Output rows.
    flip : bool
        Whether values are stored with the other sign, offset by 128.
    wide : bool, optional
        Whether values are stored as int16, for instructions that multiply these.
    """

    spec: ConvSpec
    rows: int
    flip: bool
    wide: bool = False

    @property
    def in_rows(self) -> int:
        """Input rows, padded ones included."""
        spec = self.spec
        return (self.rows - 1) * spec.stride[0] + spec.dilation[0] * (spec.kernel[0] - 1) + 1

    @property
    def pitch(self) -> int:
        """Elements from one row to the next."""
        spec = self.spec
        return (spec.padding[1] + spec.width + spec.padding[3]) * spec.in_channels

    @property
    def dtype(self) -> str:
        """Element type."""
        stored = self.spec.input.flipped if self.flip else self.spec.input
        return "int16" if self.wide else stored.dtype

    def allocate(self) -> Any:
        """Emit the allocation."""
        return tir.allocate((self.in_rows * self.pitch + _SLACK,), self.dtype)

    def fill(self, buffer: Any, data: Any, zero: Expr, image: Expr, first_row: Expr, in_rows: Expr) -> None:
        """Emit the copy.

        Parameters
        ----------
        buffer : Buffer
            From :meth:`allocate`.
        data : Buffer, shape (N, H, W, C)
            The input.
        zero : Expr
            What stands for zero in the padding, any type.
        image : Expr
            Which image.
        first_row : Expr
            First input row; negative for padding.
        in_rows : Expr
            How many rows.
        """
        spec = self.spec
        channels, width = spec.in_channels, spec.width
        left, right = spec.padding[1] * channels, spec.padding[3] * channels

        def blank(start: Expr, count: int) -> None:
            if count:
                with tir.loop(count) as i:
                    tir.store(buffer, tir.cast(zero, self.dtype), [start + i])

        def copy(start: Expr, row: Expr, count: Expr) -> None:
            with tir.loop(count) as i:
                value = tir.load(data, [image, row, 0, i])
                if self.flip:
                    value = ir.flip_sign(value, self.spec.input.dtype)
                if self.wide:
                    value = tir.cast(value, "int16")
                tir.store(buffer, value, [start + i])

        if not any(spec.padding):
            # Rows are consecutive, too.  A loop over rows of known number LLVM would write out, with that over a row.
            copy(0, first_row, in_rows * self.pitch)
            return
        with tir.loop(in_rows) as row:
            start = row * self.pitch
            is_inside = tir.all_of(first_row + row >= 0, first_row + row < spec.height)
            with tir.choose(is_inside) as (inside, outside):
                with inside:
                    blank(start, left)
                    # Columns and channels of a row are consecutive: one loop over both is a block copy.
                    copy(start + left, first_row + row, width * channels)
                    blank(start + left + width * channels, right)
                with outside:
                    blank(start, self.pitch)
