"""Direct convolution, dense or grouped, channels last.

An output tile of some pixels by some vectors of channels stays in registers while the loops run over the kernel's
rows and the input's channels.  The places under one kernel row are consecutive in memory (columns, then channels), so
without dilation and groups they are one stretch, and three input channels are as good as many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from tvm_backend.kernels import tir
from tvm_backend.kernels.arithmetic import apply_epilogue, scaled_sum
from tvm_backend.kernels.cpu import ir
from tvm_backend.kernels.cpu.isa import InstructionSet
from tvm_backend.kernels.cpu.packing import WeightLayout
from tvm_backend.kernels.cpu.sums import Sums
from tvm_backend.kernels.cpu.tasks import Tasks, run
from tvm_backend.kernels.cpu.unpack import unpack_block
from tvm_backend.kernels.cpu.weighted import Blocked, Operands, store_row, vectors_for
from tvm_backend.kernels.cpu.window import Window
from tvm_backend.kernels.spec import ConvSpec
from tvm_backend.kernels.tir import Expr

__all__ = ["ConvEmitter", "DirectConv", "Rows", "reference", "sums"]

_WEIGHT_BYTES = 640 * 1024
"""Weights beyond this do not stay in a core's own cache beside everything else."""

_UNPACK_BYTES = 256 * 1024
"""Weights that are worth unpacking by several threads."""

_EQUAL = 1.02
"""Tiles whose estimated costs differ by less than this are taken for equally fast."""

_TASKS = 32
"""Most tasks of a call: enough for as many threads, and with more the rows of the input that are copied twice add up."""


def sums(spec: ConvSpec, data: NDArray[Any], weight: NDArray[Any]) -> NDArray[np.int32]:
    """Exact sums of products, ``sum((q - zero_point) * w)``.

    Parameters
    ----------
    spec : ConvSpec
        The convolution.
    data : ndarray, shape (N, H, W, C_in)
        Input integers.
    weight : ndarray, shape (C_out, C_in / groups, kernel height, kernel width)
        Weight integers.

    Returns
    -------
    ndarray of int32, shape (N, H_out, W_out, C_out)
        The accumulators.
    """
    top, left, bottom, right = spec.padding
    shifted = data.astype(np.int64) - spec.input.zero_point
    shifted = np.pad(shifted, ((0, 0), (top, bottom), (left, right), (0, 0)))
    per_group = spec.in_channels // spec.groups
    result = np.zeros((data.shape[0], spec.out_height, spec.out_width, spec.out_channels), np.int64)
    for ky in range(spec.kernel[0]):
        for kx in range(spec.kernel[1]):
            y, x = ky * spec.dilation[0], kx * spec.dilation[1]
            taps = shifted[
                :,
                y : y + (spec.out_height - 1) * spec.stride[0] + 1 : spec.stride[0],
                x : x + (spec.out_width - 1) * spec.stride[1] + 1 : spec.stride[1],
            ]
            # Products of bytes sum exactly in float64, whose matrix product is fast.
            inputs = taps.astype(np.float64).reshape(*taps.shape[:3], spec.groups, per_group)
            factors = weight[..., ky, kx].astype(np.float64).reshape(spec.groups, -1, per_group)
            if spec.groups == 1:
                product = inputs[..., 0, :] @ factors[0].T
            else:
                product = np.einsum("nyxgi,goi->nyxgo", inputs, factors)
            result += product.reshape(result.shape).astype(np.int64)
    return result.astype(np.int32)


def reference(
    spec: ConvSpec,
    data: NDArray[Any],
    weight: NDArray[Any],
    scale: NDArray[Any],
    bias: NDArray[Any],
    residual: NDArray[Any] | None = None,
) -> tuple[NDArray[Any], ...]:
    """What every convolution kernel computes, in numpy; see :func:`sums` for shapes."""
    value = scaled_sum(sums(spec, data, weight), scale, bias)
    return apply_epilogue(value, spec.epilogue, residual)


@dataclass(frozen=True)
class DirectConv(Blocked[ConvSpec]):
    """Generator of the kernel for one :class:`ConvSpec`."""

    window_bytes: ClassVar[int] = 48 * 1024
    """Input rows that a task copies at once, so that they stay in the cache nearest to the core."""

    task_macs: ClassVar[int] = 500_000
    """Work that is worth handing to a thread: about a microsecond."""

    @classmethod
    def make(cls, spec: ConvSpec, isa: InstructionSet) -> Self:
        """The generator on the vectors that suit the values."""
        return cls(spec, vectors_for(spec, isa))

    @property
    def in_place(self) -> bool:
        """Whether the input is read where it lies: every pixel is met once, by whole groups of channels."""
        spec = self.spec
        whole = spec.in_channels // spec.groups % self.isa.group == 0
        return spec.kernel == (1, 1) and not any(spec.padding) and whole

    @property
    def pointwise(self) -> bool:
        """Whether an image's pixels form one long row that is read where it lies."""
        return self.in_place and self.spec.stride == (1, 1)

    @property
    def out_grid(self) -> tuple[int, int]:
        """Rows and columns of the output; a pointwise convolution has one row."""
        if self.pointwise:
            return 1, self.spec.out_height * self.spec.out_width
        return self.spec.out_height, self.spec.out_width

    @property
    def tile(self) -> tuple[int, int]:
        """Vectors and pixels of the register tile: of those about as fast as the fastest, the smallest weights."""
        width, out_channels = self.out_grid[1], self.spec.out_channels // self.spec.groups
        vectors_needed = -(-out_channels // self.isa.lanes)

        def stored(tile: tuple[int, int]) -> int:
            return -(-vectors_needed // tile[0]) * tile[0]

        def cost(tile: tuple[int, int]) -> float:
            vectors, most = tile
            count = -(-width // most)
            pixels = -(-width // count)
            # Loads beside each multiplication, and rows of tiles that are not full.
            return stored(tile) * (1 + 0.35 * (1 / pixels + 1 / vectors)) * (count * pixels)

        fast = _EQUAL * min(map(cost, self.isa.tiles))
        close = [tile for tile in self.isa.tiles if cost(tile) <= fast]
        vectors, most = min(close, key=lambda tile: (stored(tile), cost(tile)))
        return vectors, -(-width // -(-width // most))

    @property
    def vectors(self) -> int:
        """Vectors of output channels in a block."""
        return self.tile[0]

    @property
    def stretches(self) -> tuple[int, int]:
        """How many stretches of consecutive inputs lie under the kernel, and how long each is."""
        spec = self.spec
        per_group = spec.in_channels // spec.groups
        if spec.dilation[1] == 1 and spec.groups == 1:
            return spec.kernel[0], spec.kernel[1] * per_group
        return spec.kernel[0] * spec.kernel[1], per_group

    @property
    def layout(self) -> WeightLayout:
        """How the weights are packed."""
        spec, (runs, run) = self.spec, self.stretches
        return WeightLayout(
            isa=self.isa,
            out_channels=spec.out_channels // spec.groups,
            groups=spec.groups,
            runs=runs,
            run=run,
            vectors=self.vectors,
            bits=spec.storage_bits,
        )

    def stretched(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Weights of shape (C_out, C_in / groups, kernel height, kernel width) by group, channel and stretch."""
        groups = self.spec.groups
        last = np.asarray(weight).reshape(groups, -1, *weight.shape[1:]).transpose(0, 1, 3, 4, 2)
        return last.reshape(groups, -1, *self.stretches)

    @property
    def unpacking(self) -> str:
        """Each weight is used for many pixels, so it is unpacked before."""
        return "once a call" if self.layout.bits < 8 else ""

    @property
    def by_blocks(self) -> bool:
        """Whether threads share out the output channels before the rows, so that each reads few of the weights.

        That pays where the weights do not fit beside everything else, or are more than the input that all then read.
        """
        layout, spec = self.layout, self.spec
        count = layout.groups * layout.blocks
        into = math.prod(spec.in_shape) * spec.batch if spec.batch is not None else _WEIGHT_BYTES
        return count > 1 and count * layout.block_bytes > min(_WEIGHT_BYTES, into)

    def window(self, rows: int) -> Window:
        """The copy of the input of some output rows."""
        return Window(self.spec, rows, self.flip, wide=self.isa.operand == "int16")

    def tasks(self, batch: Expr) -> Tasks:
        """Output rows put together to tasks; for a pointwise convolution, tiles."""
        spec, (rows, width), layout = self.spec, self.out_grid, self.layout
        units, fitting = rows, None
        if self.pointwise:
            units = -(-width // self.tile[1])
        elif not self.in_place:
            fitting = (self.window_bytes // self.window(1).pitch - spec.kernel[0]) // spec.stride[0]
        macs, shares = spec.macs, spec.batch or 1
        if self.by_blocks:
            # A task is a block's share; where it unpacks the block's weights first, of a whole image.
            blocks = layout.groups * layout.blocks
            macs, shares = macs // blocks if layout.bits == 8 else 0, shares * blocks
        return Tasks(batch, units, max(1, macs // units), self.task_macs, fitting, -(-_TASKS // shares))

    def emit(self, batch: Expr, operands: Operands) -> None:
        """Write the body."""
        ConvEmitter(self, batch, operands).emit()


class ConvEmitter:
    """Writes the loops of one kernel."""

    def __init__(self, conv: DirectConv, batch: Expr, operands: Operands) -> None:
        self.conv, self.spec, self.isa, self.layout = conv, conv.spec, conv.isa, conv.layout
        self.batch, self.operands = batch, operands
        self.data, self.weight = operands.data, operands.weight
        self.window = conv.window(conv.tasks(batch).chunk)
        self.rows, self.width = conv.out_grid
        self.vectors, self.pixels = conv.vectors, conv.tile[1]
        self.block_count = self.layout.groups * self.layout.blocks

    def emit(self) -> None:
        """Write the whole body."""
        layout, tasks = self.layout, self.conv.tasks(self.batch)
        if self.conv.by_blocks:
            self.share_blocks(tasks)
            return
        panel = self.weight
        if layout.bits < 8:
            panel = tir.allocate((self.block_count * layout.block_bytes,), "int8")
            run(
                self.block_count,
                lambda block: unpack_block(layout, self.weight, block, panel, block * layout.block_bytes),
                alone=self.block_count * layout.block_bytes < _UNPACK_BYTES,
            )

        def all_blocks(rows: Rows) -> None:
            with tir.loop(self.block_count) as block:
                self.block(rows, block, panel, block * layout.block_bytes)

        def chunk_of_rows(image: Expr, first: Expr, count: Expr) -> None:
            with self.prepared():
                self.task(image, first, count, all_blocks)

        tasks.run(chunk_of_rows)

    def share_blocks(self, tasks: Tasks) -> None:
        """Tasks of one block each; neighbouring ones, which a thread gets, read the same weights."""
        layout = self.layout

        def part(block: Expr, image: Expr, index: Expr, panel: Any, start: Expr) -> None:
            self.task(image, *tasks.part(index), lambda rows: self.block(rows, block, panel, start))

        if layout.bits == 8:
            shares = self.batch * tasks.per_image
            with tir.parallel(self.block_count * shares) as index, self.prepared():
                block, image = index // shares, index % shares // tasks.per_image
                part(block, image, index % tasks.per_image, self.weight, block * layout.block_bytes)
            return
        with tir.parallel(self.block_count) as block, self.prepared():
            panel = tir.allocate((layout.block_bytes,), "int8")
            unpack_block(layout, self.weight, block, panel, 0)
            with tir.loop(self.batch) as image, tir.loop(tasks.per_image) as index:
                part(block, image, index, panel, 0)

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Around what one thread does."""
        yield

    def task(self, image: Expr, first: Expr, count: Expr, then: Callable[[Rows], None]) -> None:
        """One chunk of the output of one image."""
        spec = self.spec
        if self.conv.in_place:
            then(Rows(self.data, image, first, count))
            return
        in_rows = (count - 1) * spec.stride[0] + spec.dilation[0] * (spec.kernel[0] - 1) + 1
        buffer = self.window.allocate()
        self.window.fill(
            buffer, self.data, self.operands.zero, image, first * spec.stride[0] - spec.padding[0], in_rows
        )
        then(Rows(buffer, image, first, count))

    def block(self, rows: Rows, block: Expr, panel: Any, start: Expr) -> None:
        """All tiles of one block of output channels in one chunk."""
        full, rest = divmod(self.width, self.pixels)
        if not self.conv.pointwise:
            with tir.loop(rows.count) as row:
                y = rows.first + row
                line = y if self.conv.in_place else row
                base = line * (self.spec.stride[0] * self.window.pitch)
                with tir.loop(full) as tile:
                    self.tile(rows, block, panel, start, base, y, tile * self.pixels, self.pixels)
                if rest:
                    self.tile(rows, block, panel, start, base, y, full * self.pixels, rest)
            return
        if full:
            with tir.loop(tir.least(rows.count, full - rows.first) if rest else rows.count) as tile:
                self.tile(rows, block, panel, start, 0, 0, (rows.first + tile) * self.pixels, self.pixels)
        if rest:
            with tir.when(rows.first + rows.count == full + 1):
                self.tile(rows, block, panel, start, 0, 0, full * self.pixels, rest)

    def tile(
        self, rows: Rows, block: Expr, panel: Any, start: Expr, base: Expr, y: Expr, x: Expr, pixels: int
    ) -> None:
        """One register tile: sums over all products, then the epilogue."""
        spec, layout, isa = self.spec, self.layout, self.isa
        group, inner = block // layout.blocks, block % layout.blocks
        if layout.groups == 1:
            group, inner = 0, block
        channel = group * layout.out_channels + inner * layout.block_channels
        exact = layout.out_channels % layout.block_channels == 0
        begin = [tir.constant(0, "int32", isa.lanes)] * self.vectors
        if exact:
            begin = [
                tir.load(self.operands.compensation, [channel + v * isa.lanes], isa.lanes)
                for v in range(self.vectors)
            ]
        held = Sums(isa, begin, pixels)
        origin = base + x * (spec.stride[1] * spec.in_channels) + group * (spec.in_channels // spec.groups)

        def products(run: Expr, step: Expr) -> None:
            place = origin + self.run_offset(run) + step * isa.group
            unit = start + (run * layout.steps + step) * (self.vectors * isa.unit)
            # Few weights are held while activations come one by one: the other way round needs more registers.
            weights = [
                ir.hold(isa.weights(panel, [unit + v * isa.unit]), "int8", isa.unit)
                for v in range(self.vectors)
            ]
            for p in range(pixels):
                at = place + p * (spec.stride[1] * spec.in_channels)
                indices = [rows.image, 0, 0, at] if self.conv.in_place else [at]
                x_value = isa.activations(rows.buffer, indices, self.conv.in_place and self.conv.flip)
                for v in range(self.vectors):
                    held.add(p * self.vectors + v, x_value, weights[v])

        held.loops(layout.runs, layout.steps, products)
        for p in range(pixels):
            where = [rows.image, y, x + p]
            row = [held[p * self.vectors + v] for v in range(self.vectors)]
            store_row(self.operands, layout, row, where, channel, inner, exact)

    def run_offset(self, run: Expr) -> Expr:
        """Where a stretch begins, relative to the tile's first input place."""
        spec = self.spec
        if self.layout.runs == 1:
            return 0
        if self.layout.runs == spec.kernel[0]:
            return run * (spec.dilation[0] * self.window.pitch)
        ky, kx = run // spec.kernel[1], run % spec.kernel[1]
        return ky * (spec.dilation[0] * self.window.pitch) + kx * (spec.dilation[1] * spec.in_channels)


@dataclass(frozen=True)
class Rows:
    """Where a chunk reads its input: a window's buffer, or the data themselves."""

    buffer: Any
    image: Expr
    first: Expr
    count: Expr
