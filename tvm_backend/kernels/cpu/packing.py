"""Weights in the order in which a kernel reads them, at their own bit-width.

A packed weight is one row of bytes.  Weights are first laid out as vectors of ``lanes x group`` bytes in reading
order.  Below 8 bits several vectors share their bytes: four vectors at 2 bits, two at 4 bits, the first in the lowest
bits, so that a vector is unpacked by one shift and one mask.  A code is the weight minus its channel's lowest value,
which is kept, one byte a channel, behind the codes; where each stretch has zero points of its own, one byte a channel and stretch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_backend.kernels.cpu.isa import InstructionSet
from tvm_backend.kernels.weights import as_int8, check_span

__all__ = ["WeightLayout"]


@dataclass(frozen=True)
class WeightLayout:
    """Where each weight lies.

    Parameters
    ----------
    isa : InstructionSet
        Gives the size of a vector.
    out_channels : int
        Output channels of one group.
    groups : int
        Groups of the convolution.
    runs : int
        Stretches of consecutive activations that one output value is summed from.
    run : int
        Activations in a stretch; padded with zero weights to a multiple of the instruction's group.
    vectors : int
        Vectors of output channels in a block, that is in a register tile.
    bits : int
        2, 4 or 8.
    spans : int
        Equal numbers of stretches that have lowest values of their own: 1 for one a channel.
    """

    isa: InstructionSet
    out_channels: int
    groups: int
    runs: int
    run: int
    vectors: int
    bits: int
    spans: int = 1

    @property
    def steps(self) -> int:
        """Instruction groups in a stretch."""
        return -(-self.run // self.isa.group)

    @property
    def block_channels(self) -> int:
        """Output channels in a block."""
        return self.vectors * self.isa.lanes

    @property
    def blocks(self) -> int:
        """Blocks in a group of the convolution, the last one possibly not full."""
        return -(-self.out_channels // self.block_channels)

    @property
    def block_units(self) -> int:
        """Weight vectors in a block, filled up so that unpacking goes by whole periods."""
        units = self.runs * self.steps * self.vectors
        return -(-units // self.period) * self.period

    @property
    def period(self) -> int:
        """Units after which both the place in a byte and the channels repeat."""
        return math.lcm(8 // self.bits, self.vectors)

    @property
    def block_bytes(self) -> int:
        """Bytes of an unpacked block."""
        return self.block_units * self.isa.unit

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of all blocks."""
        return self.groups * self.blocks * self.block_bytes * self.bits // 8

    @property
    def length(self) -> int:
        """Bytes of the packed weight."""
        channels = self.groups * self.blocks * self.spans * self.block_channels
        return self.code_bytes + (channels if self.bits < 8 else 0)

    @property
    def dtype(self) -> str:
        """Element type of the packed weight."""
        return "int8" if self.bits == 8 else "uint8"

    def _blocked(self, weight: NDArray[Any]) -> NDArray[Any]:
        """From (groups, channels, runs, run) to (groups, blocks, units, lanes, group)."""
        lanes, group = self.isa.lanes, self.isa.group
        padded = np.zeros(
            (self.groups, self.blocks * self.block_channels, self.runs, self.steps * group), weight.dtype
        )
        padded[:, : self.out_channels, :, : self.run] = weight
        shape = (self.groups, self.blocks, self.vectors, lanes, self.runs, self.steps, group)
        ordered = padded.reshape(shape).transpose(0, 1, 4, 5, 2, 3, 6)
        flat = ordered.reshape(self.groups, self.blocks, -1, lanes, group)
        result = np.zeros((self.groups, self.blocks, self.block_units, lanes, group), weight.dtype)
        result[:, :, : flat.shape[2]] = flat
        return result

    def pack(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Pack integer weights.

        Parameters
        ----------
        weight : ndarray of int, shape (groups, out_channels, runs, run)
            The weights of each group.

        Returns
        -------
        ndarray of int8 or uint8, shape (length,)
            The bytes in reading order.

        Raises
        ------
        CompileError
            If a channel's weights span more values than the bit-width has.
        """
        weight = as_int8(weight)
        if self.bits == 8:
            return np.ascontiguousarray(self._blocked(weight).reshape(-1))
        # Zero is always among the values: it fills up stretches and blocks.
        spans = weight.reshape(self.groups, self.out_channels, self.spans, -1)
        lowest = np.minimum(spans.min(axis=3), 0)
        check_span(np.maximum(spans.max(axis=3), 0) - lowest, self.bits)
        offsets = np.zeros((self.groups, self.blocks * self.block_channels, self.spans), np.int8)
        offsets[:, : self.out_channels] = lowest
        by_span = offsets.reshape(self.groups, self.blocks, -1, self.spans).swapaxes(2, 3)
        per_vector = by_span.reshape(self.groups, self.blocks, self.spans, self.vectors, self.isa.lanes, 1)
        step, vector = np.divmod(np.arange(self.block_units), self.vectors)
        span = np.minimum(step // (self.runs * self.steps // self.spans), self.spans - 1)
        codes = (self._blocked(weight.astype(np.int16)) - per_vector[:, :, span, vector]).astype(np.uint8)
        share = 8 // self.bits
        units = codes.reshape(self.groups, self.blocks, -1, share, self.isa.unit)
        packed = np.zeros(units.shape[:3] + units.shape[4:], np.uint8)
        for position in range(share):
            packed |= units[:, :, :, position] << (position * self.bits)
        return np.concatenate([packed.reshape(-1), by_span.reshape(-1).view(np.uint8)])
