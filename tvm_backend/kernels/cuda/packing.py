"""Weights for the tiled CUDA kernels: whole tiles in reading order, at their own bit-width.

A weight is a matrix of output channels by products.  It is cut into tiles of 32 channels (16, where there are no more) by
64 products, each stored channel after channel; a block of threads reads one or some of them, whatever the size of its tile
of sums, so that functions for several batch sizes share a weight.  Below 8 bits a piece of
16 products shares 4 or 8 bytes: product ``4 s + b`` lies in byte b, shifted by ``bits * s``, so that four products are
unpacked by one shift and one mask.  A code is the weight minus its channel's lowest value, kept behind the codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_backend.kernels.weights import as_int8, check_span

__all__ = ["CHUNK", "TileLayout"]

CHUNK = 64
"""Products, and bytes of activations, in a tile."""


@dataclass(frozen=True)
class TileLayout:
    """Where each weight lies.

    Parameters
    ----------
    channels : int
        Output channels.
    products : int
        Products summed for one output, padding between taps included.
    bits : int
        2, 4 or 8.
    """

    channels: int
    products: int
    bits: int

    @property
    def columns(self) -> int:
        """Channels of a tile."""
        return 16 if self.channels <= 16 else 32

    @property
    def chunks(self) -> int:
        """Tiles along the products."""
        return -(-self.products // CHUNK)

    @property
    def blocks(self) -> int:
        """Tiles along the channels; an even number of several, as blocks of threads may read two at once."""
        count = -(-self.channels // self.columns)
        return count if count == 1 else -(-count // 2) * 2

    @property
    def tile_bytes(self) -> int:
        """Bytes of a packed tile."""
        return self.columns * CHUNK * self.bits // 8

    @property
    def code_bytes(self) -> int:
        """Bytes of all tiles."""
        return self.blocks * self.chunks * self.tile_bytes

    @property
    def length(self) -> int:
        """Bytes of the packed weight."""
        return self.code_bytes + (self.blocks * self.columns if self.bits < 8 else 0)

    @property
    def dtype(self) -> str:
        """Element type of the packed weight."""
        return "int8" if self.bits == 8 else "uint8"

    def pack(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Pack a matrix of integers.

        Parameters
        ----------
        weight : ndarray of int, shape (channels, products)
            Within int8.

        Returns
        -------
        ndarray of int8 or uint8, shape (length,)
            The tiles, and below 8 bits each channel's lowest weight.

        Raises
        ------
        CompileError
            If a channel's weights span more values than the bit-width has.
        """
        weight = as_int8(weight)
        padded = np.zeros((self.blocks * self.columns, self.chunks * CHUNK), np.int16)
        padded[: self.channels, : self.products] = weight
        lowest = np.minimum(padded.min(axis=1), 0)
        if self.bits < 8:
            check_span(padded.max(axis=1) - lowest, self.bits)
            padded -= lowest[:, None]
        tiles = padded.reshape(self.blocks, self.columns, self.chunks, CHUNK).transpose(0, 2, 1, 3)
        if self.bits == 8:
            return np.ascontiguousarray(tiles.astype(np.int8).reshape(-1))
        # (piece of 16, shift and word, byte): at 2 bits one word of four shifts, at 4 bits two words of two.
        share = 8 // self.bits
        pieces = tiles.astype(np.uint8).reshape(-1, 4 // share, share, 4)
        shifts = (np.arange(share) * self.bits).astype(np.uint8)[None, None, :, None]
        codes = np.bitwise_or.reduce(pieces << shifts, axis=2).reshape(-1)
        return np.concatenate([codes.astype(np.uint8), lowest.astype(np.int8).view(np.uint8)])
