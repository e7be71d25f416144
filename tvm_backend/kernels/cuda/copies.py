"""Tiles of a product that are copied from memory to shared memory as they lie, some chunks ahead, by ``cp.async``.

Padding is copied from a piece behind the packed weight that holds the input's zero point.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from tvm_backend.kernels import tir
from tvm_backend.kernels.cuda import device
from tvm_backend.kernels.cuda.packing import CHUNK
from tvm_backend.kernels.cuda.tiles import PITCH
from tvm_backend.kernels.tir import Expr

if TYPE_CHECKING:
    from tvm_backend.kernels.cuda.product import ProductEmitter

__all__ = ["BORDER", "Copies"]

BORDER = 16
"""Bytes of one copy."""


class Copies:
    """Writes the loop over chunks of one kernel.

    Parameters
    ----------
    emitter : ProductEmitter
        What writes the rest.
    """

    def __init__(self, emitter: ProductEmitter) -> None:
        self.emitter, self.stages = emitter, emitter.tile.stages

    def multiply_all(self) -> None:
        """Each chunk is copied some steps before it is multiplied."""
        emitter, chunks = self.emitter, self.emitter.layout.chunks
        for chunk in range(self.stages - 1):
            self._begin(chunk)
        with tir.loop(chunks) as chunk:
            device.act(f"cat_wait_{self.stages - 2}")
            # What is here for all; and all have multiplied what the next copy overwrites.
            device.barrier()
            self._begin(chunk + (self.stages - 1))
            emitter.left_begin, emitter.right_begin = self._stage(chunk)
            emitter.multiply()

    def _stage(self, chunk: Expr) -> tuple[Expr, Expr]:
        """Where the chunk's tiles lie."""
        left, right = self.emitter.sizes
        return chunk % self.stages * left, chunk % self.stages * right

    def _begin(self, chunk: Expr) -> None:
        """Begin to copy a chunk, if there is one; a group of copies in any case, for waiting counts them."""
        chunks = self.emitter.layout.chunks
        exists = chunk < chunks
        if exists is not False:
            with tir.when(exists):
                self._activations(chunk)
                self._weights(chunk)
        device.act("cat_commit")

    def _activations(self, chunk: Expr) -> None:
        emitter, (begin, _) = self.emitter, self._stage(chunk)
        border = emitter.weight_words, emitter.layout.length // 4
        for i in range(emitter.pieces):
            row, place = emitter.piece(i)
            inside, start = self._source(chunk, i)
            copy = partial(device.emit, "cat_copy16", (emitter.left, begin + row * PITCH + place * 4))
            tir.branch(inside, partial(copy, (emitter.data_words, start)), partial(copy, border))

    def _weights(self, chunk: Expr) -> None:
        emitter, (_, begin) = self.emitter, self._stage(chunk)
        for i in range(emitter.weight_pieces):
            number, channel, place = emitter.weight_piece(i)
            target = emitter.right, begin + channel * PITCH + place * 4
            with emitter.existing(number):
                device.emit("cat_copy16", target, (emitter.weight_words, emitter.weight_place(chunk, i)))

    def _source(self, chunk: Expr, i: int) -> tuple[Expr, Expr]:
        """Whether the thread's i-th piece of activations lies inside the image, and the word where it begins."""
        emitter, conv, tap = self.emitter, self.emitter.conv, self.emitter.product.tap
        place = chunk * CHUNK + emitter.piece(i)[1] * BORDER
        channel, number = place % tap, place // tap
        y = emitter.corner[2 * i] + number // conv.kernel[1] * conv.dilation[0]
        x = emitter.corner[2 * i + 1] + number % conv.kernel[1] * conv.dilation[1]
        start = emitter.image[i] + (y * conv.width + x) * (conv.in_channels // BORDER) + channel // BORDER
        # What fills up the last chunk may lie outside as well.
        if not any(conv.padding) and emitter.product.products % CHUNK == 0:
            return True, start * 4
        return tir.all_of(y >= 0, y < conv.height, x >= 0, x < conv.width), start * 4
