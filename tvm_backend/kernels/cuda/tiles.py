"""How the tiles of products are shared among the warps of a block, and laid out in shared memory."""

from __future__ import annotations

from dataclasses import dataclass

from tvm_backend.kernels.cuda.packing import CHUNK

__all__ = ["PITCH", "WAVE", "Tile", "choose_tile", "pair_tile"]

PITCH = CHUNK // 4 + 4
"""Words from one row of shared memory to the next."""

WAVE = 132
"""Blocks that run at once; an H100 has as many multiprocessors."""


@dataclass(frozen=True)
class Tile:
    """How a block's tile of sums is shared among its warps.

    Parameters
    ----------
    rows, columns : int
        Pixels and channels of the tile.
    warps : tuple of (int, int)
        Warps along rows and columns.
    splits : int
        Groups of so many warps, which share the long axis among them and add up what they have at the end.
    """

    rows: int
    columns: int
    warps: tuple[int, int]
    splits: int = 1

    @property
    def group(self) -> int:
        """Threads of a group."""
        return 32 * self.warps[0] * self.warps[1]

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.group * self.splits

    @property
    def fragments(self) -> tuple[int, int]:
        """Tensor core fragments of a warp along rows (16) and columns (8)."""
        return self.rows // self.warps[0] // 16, self.columns // self.warps[1] // 8


_NARROW = {16: Tile(64, 16, (4, 1)), 32: Tile(64, 32, (4, 1)), 64: Tile(64, 64, (2, 2))}
_WIDE = Tile(128, 128, (2, 4))


def choose_tile(rows: int | None, channels: int, tensor_cores: bool, chunks: int = 1) -> Tile:
    """A tile for a product.

    Parameters
    ----------
    rows : int or None
        Output pixels, if the batch is known.
    channels : int
        Output channels.
    tensor_cores : bool
        Whether mma is used.
    chunks : int
        Length of the sums, in tiles of :data:`~tvm_backend.kernels.cuda.packing.CHUNK`.
    """
    if tensor_cores and rows is not None and -(-rows // 64) * -(-channels // 64) < WAVE and channels > 16:
        # Few tiles would leave most of the device idle: smaller ones, and several warps for the sums of each.
        return Tile(
            16, 32, (1, 1), next(splits for splits in (8, 4, 2, 1) if chunks >= 2 * splits or splits == 1)
        )
    wide_blocks = (rows or 0) // _WIDE.rows * (channels // _WIDE.columns)
    if tensor_cores and channels % _WIDE.columns == 0 and wide_blocks >= 2 * WAVE:
        return _WIDE
    return _NARROW[16 if channels <= 16 else 32 if channels <= 32 else 64]


def pair_tile(batch: int | None, rows: int, columns: int) -> Tile:
    """A tile for pairs of matrices that are both computed at run time.

    Parameters
    ----------
    batch : int or None
        Pairs, if that is known.
    rows, columns : int
        Of the product of one pair.
    """
    blocks = (batch or 0) * -(-rows // 64) * -(-columns // 64)
    return Tile(64, 64, (2, 2)) if blocks >= 2 * WAVE or batch is None else Tile(32, 64, (1, 4))
