"""Convolution and linear layers as tiled integer matrix products, by tensor cores (int8 mma) or by dp4a.

A convolution is an implicit product: rows are output pixels, columns output channels, and the long axis runs over taps
and channels of the input, which are gathered while a tile is loaded.  A block of threads computes a tile of
``rows x columns`` sums in chunks of 64 products: while the warps multiply one chunk out of shared memory, the next is
on its way from memory into registers.  Rows of shared memory are 80 bytes apart, which keeps 16-byte alignment and
puts the eight rows that a warp reads at once into different banks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from tvm.tirx import PrimFunc

from tvm_backend.kernels import tir
from tvm_backend.kernels.cuda import device
from tvm_backend.kernels.cuda.generator import CudaGenerator
from tvm_backend.kernels.cuda.isa import Cuda
from tvm_backend.kernels.cuda.packing import CHUNK, TileLayout
from tvm_backend.kernels.cuda.tiles import PITCH, Tile, choose_tile
from tvm_backend.kernels.spec import Argument, ConvSpec, WeightedSpec
from tvm_backend.kernels.tir import Expr

__all__ = ["Product", "ProductEmitter"]


@dataclass(frozen=True)
class Product(CudaGenerator[WeightedSpec]):
    """Base class of the generators of products; a convolution has one group.

    Attributes
    ----------
    tensor_cores : bool
        Whether a block is fast enough for large tiles.
    """

    tensor_cores: ClassVar[bool]

    @classmethod
    def make(cls, spec: WeightedSpec, isa: Cuda) -> Self:
        """The generator on what the device multiplies with."""
        return cls(spec, isa)

    @property
    def conv(self) -> ConvSpec:
        """The specification as a convolution; a linear layer is one on a single pixel."""
        spec = self.spec
        if isinstance(spec, ConvSpec):
            return spec
        (inputs,), (outputs,) = spec.in_shape, spec.out_shape
        sizes = (spec.batch, 1, 1, inputs, outputs, (1, 1), spec.input, spec.epilogue)
        return ConvSpec(*sizes, weight_bits=spec.weight_bits)

    @property
    def stored_zero(self) -> int:
        """The zero point of the activations as they are multiplied."""
        return self.spec.input.zero_point

    @property
    def unit(self) -> int:
        """Activations loaded at once."""
        channels = self.conv.in_channels
        return 16 if channels % 16 == 0 else 4 if channels % 4 == 0 else 1

    @property
    def tap(self) -> int:
        """Products of one tap, padded to whole words."""
        return -(-self.conv.in_channels // 4) * 4

    @property
    def tile(self) -> Tile:
        """The block's tile."""
        conv = self.conv
        rows = None if conv.batch is None else conv.batch * conv.out_height * conv.out_width
        return choose_tile(rows, conv.out_channels, self.tensor_cores, -(-self.products // CHUNK))

    @property
    def products(self) -> int:
        """Length of the sums."""
        return self.conv.kernel[0] * self.conv.kernel[1] * self.tap

    @property
    def layout(self) -> TileLayout:
        """How the weights are packed."""
        conv = self.conv
        return TileLayout(conv.out_channels, self.products, conv.storage_bits)

    def pack_weight(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Pack weights of the specification's ``weight_shape``."""
        conv = self.conv
        matrix = np.zeros((conv.out_channels, *conv.kernel, self.tap), np.int16)
        matrix[..., : conv.in_channels] = np.asarray(weight).reshape(conv.weight_shape).transpose(0, 2, 3, 1)
        return self.layout.pack(matrix.reshape(conv.out_channels, -1))

    @property
    def weight_length(self) -> int:
        """Bytes of the packed weight."""
        return self.layout.length

    def arguments(self, batch: Expr) -> list[Argument]:
        """The kernel's arguments, in order."""
        return self.spec.weighted_arguments(batch, self.weight_length, self.layout.dtype)

    def build(self, name: str) -> PrimFunc:
        """The PrimFunc."""
        conv, tile = self.conv, self.tile
        batch = tir.batch_extent(conv.batch)
        arguments = self.arguments(batch)
        with tir.Function(name, private=True) as function:
            buffers = dict(zip([name for name, _, _ in arguments], function.buffers(arguments), strict=True))
            total = batch * (conv.out_height * conv.out_width)
            # Packed weights may go on behind the last tile that has channels.
            blocks = [(total + tile.rows - 1) // tile.rows, -(-conv.out_channels // tile.columns)]
            with device.threads(blocks, tile.threads) as (block, thread):
                self.emitter(buffers, total, block, thread).emit()
        return function.result

    @abstractmethod
    def emitter(
        self, buffers: dict[str, Any], total: Expr, block: list[Expr], thread: Expr
    ) -> ProductEmitter:
        """What writes the body.

        Parameters
        ----------
        buffers : dict
            The kernel's arguments by name.
        total : Expr
            Output pixels of the batch.
        block, thread : Expr
            Numbers of the block, along pixels and channels, and of the thread within it.
        """


class ProductEmitter(ABC):
    """Writes the body of one kernel."""

    def __init__(
        self, product: Product, buffers: dict[str, Any], total: Expr, block: list[Expr], thread: Expr
    ) -> None:
        self.product, self.conv, self.layout, self.tile = product, product.conv, product.layout, product.tile
        # 32-bit offsets count units of a load: a tensor may hold 2**31 of them.
        self.buffers, self.total = buffers, tir.cast(total, "int32")
        self.group, self.thread = thread // self.tile.group, thread % self.tile.group
        self.first = tir.cast(block[0], "int32") * self.tile.rows
        self.column_block = tir.cast(block[1], "int32")
        # The last axis of the data is indexed for all: a pixel's channels are contiguous.
        self.lead = [0] * (len(buffers["data"].shape) - 1)
        self.unit = product.unit
        if self.unit > 1:
            pixels = buffers["data"].shape[0] * (self.conv.height * self.conv.width)
            self.data_words = device.words(buffers["data"], pixels * self.conv.in_channels // 4)
        self.weight_words = device.words(buffers["weight"], product.weight_length // 4)
        splits, sizes = self.tile.splits, (self.tile.rows * PITCH, self.tile.columns * PITCH)
        self.left, self.right = (device.shared(splits * size, "int32") for size in sizes)
        self.left_begin, self.right_begin = (self.group * size if splits > 1 else 0 for size in sizes)

    def emit(self) -> None:
        """The loop over chunks, the next on its way into registers while one is multiplied, then the epilogue."""
        tile = self.tile
        per_row = 4 if self.product.unit == 16 else 16
        self.words = 16 // per_row
        self.pieces = tile.rows * per_row // tile.group
        self.per_row = per_row
        self.activations = device.local(self.pieces * self.words, "int32")
        self.weight_pieces = -(-tile.columns * 4 // tile.group)
        self.weights = device.local(4 * self.weight_pieces, "int32")
        self._locate()
        self.begin()
        self._fetch(self._chunk(0))
        steps = -(-self.layout.chunks // tile.splits)
        with tir.loop(steps) as step:
            device.barrier()
            self._deposit()
            device.barrier()
            with tir.when(step + 1 < steps):
                self._fetch(self._chunk(step + 1))
            self.multiply()
        self.finish()

    def _chunk(self, step: Expr) -> Expr:
        """The chunk of the thread's group in a step."""
        return step * self.tile.splits + self.group if self.tile.splits > 1 else step

    @abstractmethod
    def begin(self) -> None:
        """Declare the thread's sums, all zero."""

    @abstractmethod
    def multiply(self) -> None:
        """Add the products of the chunk in shared memory to the thread's sums."""

    @abstractmethod
    def finish(self) -> None:
        """Store what the epilogue makes of each of the thread's sums."""

    def _piece(self, i: int) -> tuple[Expr, Expr]:
        """Row of the tile and place in it of the thread's i-th piece of activations."""
        step = self.tile.group // self.per_row
        return self.thread // self.per_row + i * step, self.thread % self.per_row

    def _locate(self) -> None:
        """Where the windows of the thread's rows start: offset of the image, first row and column."""
        conv = self.conv
        self.image = device.local(self.pieces, "int32")
        self.corner = device.local(2 * self.pieces, "int32")
        for i in range(self.pieces):
            # Behind the last pixel it is loaded again, and not stored.
            pixel = tir.smaller(self.first + self._piece(i)[0], self.total - 1)
            place = pixel % (conv.out_height * conv.out_width)
            image = pixel // (conv.out_height * conv.out_width)
            tir.store(self.image, image * (conv.height * conv.width * conv.in_channels // self.unit), [i])
            top = place // conv.out_width * conv.stride[0] - conv.padding[0]
            left = place % conv.out_width * conv.stride[1] - conv.padding[1]
            tir.store(self.corner, top, [2 * i])
            tir.store(self.corner, left, [2 * i + 1])

    def _fetch(self, chunk: Expr) -> None:
        for i in range(self.pieces):
            self._fetch_activations(chunk, i)
        for i in range(self.weight_pieces):
            self._fetch_weights(chunk, i)

    def _fetch_activations(self, chunk: Expr, i: int) -> None:
        conv, tap, words = self.conv, self.product.tap, self.words
        place = chunk * CHUNK + self._piece(i)[1] * (4 * words)
        channel, number = place % tap, place // tap
        y = self.corner[2 * i] + number // conv.kernel[1] * conv.dilation[0]
        x = self.corner[2 * i + 1] + number % conv.kernel[1] * conv.dilation[1]
        pixel = (y * conv.width + x) * (conv.in_channels // self.unit)
        data, dtype = self.buffers["data"], conv.input.dtype
        # Padding is the zero point. Places behind the last tap meet zero weights, whatever is loaded there.
        zero = np.full(4, conv.input.zero_point).astype(dtype).view(np.int32)[0]
        zero_word = tir.int32(int(zero))
        inside = tir.all_of(y >= 0, y < conv.height, x >= 0, x < conv.width)
        if self.layout.chunks % self.tile.splits:
            # Behind the last chunk there are no weights; zeros leave the sums of the last one's as they are.
            exists = chunk < self.layout.chunks
            inside, zero_word = (
                tir.all_of(exists, inside),
                tir.select(exists, tir.int32(int(zero)), tir.int32(0)),
            )
        with tir.choose(inside) as (load, pad):
            with load:
                start = self.image[i] + pixel
                if self.unit == 1:
                    self._gather(data, start, channel, i)
                else:
                    # Counting in units and multiplying last shows TVM that the load is aligned.
                    raw = tir.load(self.data_words, [(start + channel // self.unit) * words], words)
                    tir.store(self.activations, raw, [words * i], words)
            with pad:
                for word in range(words):
                    tir.store(self.activations, zero_word, [words * i + word])

    def _gather(self, data: Any, start: Expr, channel: Expr, i: int) -> None:
        """A word of single bytes; behind the last channel that one again, for it meets a zero weight."""
        total: Expr = None
        for byte in range(4):
            place = tir.smaller(channel + byte, self.conv.in_channels - 1)
            value = tir.cast(tir.cast(tir.load(data, [*self.lead, start + place]), "uint8"), "uint32")
            value = value << tir.constant(8 * byte, "uint32")
            total = value if total is None else total | value
        tir.store(self.activations, tir.reinterpret("int32", total), [i])

    def _weight_piece(self, i: int) -> tuple[Expr, Expr, Expr]:
        """Number, channel and place of the thread's i-th piece of 16 weights."""
        number = self.thread + i * self.tile.group
        return number, number // 4, number % 4

    def _weight_place(self, chunk: Expr, i: int) -> Expr:
        """The word where the thread's i-th piece of a chunk's weights begins."""
        layout = self.layout
        _, channel, place = self._weight_piece(i)
        tile = self.column_block * (self.tile.columns // layout.columns) + channel // layout.columns
        piece = channel % layout.columns * 4 + place
        words = layout.bits // 2
        return ((tile * layout.chunks + chunk) * (layout.columns * 4) + piece) * words

    def _existing(self, number: Expr) -> Any:
        return tir.when(number < self.tile.columns * 4)

    def _fetch_weights(self, chunk: Expr, i: int) -> None:
        layout, weight = self.layout, self.buffers["weight"]
        number, channel, _ = self._weight_piece(i)
        if layout.chunks % self.tile.splits:
            chunk = tir.smaller(chunk, layout.chunks - 1)
        start = self._weight_place(chunk, i)
        with self._existing(number):
            if layout.bits == 8:
                tir.store(self.weights, tir.load(self.weight_words, [start], 4), [4 * i], 4)
                return
            # Codes and, in the last word, the channel's lowest weight in every byte.
            for word in range(layout.bits // 2):
                tir.store(self.weights, self.weight_words[start + word], [4 * i + word])
            place = layout.code_bytes + self.column_block * self.tile.columns + channel
            lowest = tir.cast(tir.load(weight, [place]), "uint32") * tir.constant(0x01010101, "uint32")
            tir.store(self.weights, tir.reinterpret("int32", lowest), [4 * i + 3])

    def _unpacked(self, i: int, word: int) -> Expr:
        """Four weights out of the registers."""
        bits = self.layout.bits
        if bits == 8:
            return self.weights[4 * i + word]
        share = 8 // bits
        source = tir.reinterpret("uint32", self.weights[4 * i + word // share])
        mask = tir.constant(((1 << bits) - 1) * 0x01010101, "uint32")
        codes = (source >> tir.constant(bits * (word % share), "uint32")) & mask
        lowest = tir.reinterpret("uint32", self.weights[4 * i + 3])
        # Bytes are added without a carry from one to the next: codes leave the highest bit free.
        low, sign = tir.constant(0x7F7F7F7F, "uint32"), tir.constant(0x80808080, "uint32")
        return tir.reinterpret("int32", (codes + (lowest & low)) ^ (lowest & sign))

    def _deposit(self) -> None:
        for i in range(self.pieces):
            row, place = self._piece(i)
            where = self.left_begin + row * PITCH + place * self.words
            value = tir.load(self.activations, [self.words * i], self.words)
            tir.store(self.left, value, [where], self.words)
        for i in range(self.weight_pieces):
            number, channel, place = self._weight_piece(i)
            begin = self.right_begin
            with self._existing(number):
                for word in range(4):
                    tir.store(
                        self.right, self._unpacked(i, word), [begin + channel * PITCH + place * 4 + word]
                    )

    def channel(self, column: Expr) -> Expr:
        """The output channel of a column of the tile."""
        return self.column_block * self.tile.columns + column
