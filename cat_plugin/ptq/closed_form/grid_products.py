"""Products of a layer's inputs with themselves and with its outputs, where the inputs lie on a grid.

Of what a quantizer gives, ``x = s n`` with whole numbers ``n``, the second moment ``s^2 sum n n'`` needs no floating point: products
of bytes with sums of 32 bits are exact and, where processors have them, several times as fast.  Elsewhere floats take their place, in
sums so short that they are exact as well, so that every processor finds the same.  The product with the outputs is what a convolution's backward
pass computes for its weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cat_plugin.ptq.quantizers.uniform import ActQuantizer
from cat_plugin.torch_compat import bytes_multiply_fast, product_of_bytes

__all__ = ["Grid", "Windows", "byte_products", "from_bytes_"]

_ROWS = 1 << 16  # whose products of two bytes add up in 32 bits
_FLOAT_ROWS = 1 << 10  # whose products of two bytes add up to whole numbers that float32 holds


@dataclass(frozen=True)
class Grid:
    """Where values lie that a quantizer gave: ``scale * (byte + offset)``.

    Attributes
    ----------
    scale : float
        Distance of two levels.
    offset : int
        What the least level's byte, -128 or more, is short of its number.
    """

    scale: float
    offset: int

    @classmethod
    def of(cls, quantizer: object) -> Grid | None:
        """That of a quantizer with one grid for all values; None for anything else."""
        if type(quantizer) is not ActQuantizer or not quantizer.ready:
            return None
        least = quantizer.qrange[0] - quantizer.zero_point
        greatest = quantizer.qrange[1] - quantizer.zero_point
        offset = 0 if least >= -128 and greatest <= 127 else least + 128
        return cls(float(quantizer.scale), offset)

    def bytes_of(self, x: Tensor) -> Tensor:
        """int8 of values on the grid."""
        return (x * (1.0 / self.scale)).round_().sub_(self.offset).to(torch.int8)


@dataclass(frozen=True)
class Windows:
    """What a convolution of one group reads.

    Attributes
    ----------
    kernel, stride, dilation : list of int
        Of both axes.
    padding : list of int
        Arguments of ``F.pad``.
    """

    kernel: list[int]
    stride: list[int]
    dilation: list[int]
    padding: list[int]

    def padded(self, x: Tensor, value: int = 0) -> Tensor:
        """(N, I, H, W) with its border."""
        return F.pad(x, self.padding, value=value) if any(self.padding) else x

    def columns(self, x: Tensor) -> Tensor:
        """(I*k, N*L) values of a padded input that each of the output positions reads."""
        windows = x
        for axis in (0, 1):
            reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
            windows = windows.unfold(2 + axis, reach, self.stride[axis])
        windows = windows[..., :: self.dilation[0], :: self.dilation[1]]  # (N, I, H', W', k, k)
        width = x.shape[1] * self.kernel[0] * self.kernel[1]
        return windows.permute(1, 4, 5, 0, 2, 3).reshape(width, -1)

    def weight_gradient(self, x: Tensor, y: Tensor) -> Tensor:
        """(I*k, O) sums over positions of what a padded input gives there, times the (N, O, H', W') outputs."""
        weight = x.new_empty(y.shape[1], x.shape[1], *self.kernel)
        arguments = (None, self.stride, [0, 0], self.dilation, False, [0, 0], 1, [False, True, False])
        _, gradient, _ = torch.ops.aten.convolution_backward(y, x, weight, *arguments)
        return gradient.flatten(1).T  # type: ignore[no-any-return]


def byte_products(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over rows of bytes and of their products in pairs, exact.

    Parameters
    ----------
    columns : Tensor
        (K, P) int8, each row of inputs a column.

    Returns
    -------
    second, first : Tensor
        (K, K) int32 or float32, float64 where there are more rows than one sum holds, and (K,) int64.
    """
    some, *others = torch.split(columns, _ROWS if bytes_multiply_fast() else _FLOAT_ROWS, 1)
    second = _products(some)
    for some in others:
        second = second.double().add_(_products(some))
    return second, columns.sum(1, dtype=torch.int64)


def _products(columns: Tensor) -> Tensor:
    """(K, K) of rows few enough for one sum."""
    if bytes_multiply_fast():
        return product_of_bytes(columns, columns.T)
    values = columns.float()
    return values @ values.T


def from_bytes_(second: Tensor, first: Tensor, rows: float, grid: Grid) -> None:
    """Turn sums over bytes, in place, into those over the values that they stand for.

    Parameters
    ----------
    second, first : Tensor
        (1, K, K) and (1, K) float64 sums of products and of bytes.
    rows : float
        How many were added up.
    grid : Grid
        What the bytes stand for.
    """
    if grid.offset:
        shift = first * grid.offset + 0.5 * rows * grid.offset**2
        second.add_(shift.unsqueeze(1)).add_(shift.unsqueeze(2))
        first += rows * grid.offset
    second *= grid.scale**2
    first *= grid.scale
