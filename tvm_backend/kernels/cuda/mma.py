"""The tiled product by tensor cores: int8 ``mma`` of a warp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm_backend.kernels import tir
from tvm_backend.kernels.cuda import device
from tvm_backend.kernels.cuda.epilogue import CHANNELWISE, finish_pair, finish_sum, scaled_sum
from tvm_backend.kernels.cuda.fragments import Fragments
from tvm_backend.kernels.cuda.isa import TensorCores
from tvm_backend.kernels.cuda.product import Product, ProductEmitter
from tvm_backend.kernels.kernel import Machine
from tvm_backend.kernels.spec import WeightedSpec
from tvm_backend.kernels.tir import Expr

__all__ = ["MmaProduct"]


@dataclass(frozen=True)
class MmaProduct(Product):
    """Generator of a convolution or a linear layer by tensor cores."""

    tensor_cores: ClassVar[bool] = True

    @classmethod
    def takes(cls, spec: WeightedSpec, isa: Machine) -> bool:
        """Whether the device has such products."""
        return isinstance(isa, TensorCores)

    def emitter(
        self, buffers: dict[str, Any], total: Expr, block: list[Expr], thread: Expr
    ) -> ProductEmitter:
        """What writes the body."""
        return _Emitter(self, buffers, total, block, thread)


class _Emitter(ProductEmitter):
    """Writes the body of one kernel."""

    def begin(self) -> None:
        """Fragments of sums."""
        self.fragments = Fragments(self.tile, self.thread, self.left, self.right, self.conv.input.signed)

    def multiply(self) -> None:
        """All fragments of the warp."""
        self.fragments.multiply(self.left_begin, self.right_begin)

    def finish(self) -> None:
        """Row by row; where groups share the sums, after they are added up."""
        if self.tile.splits > 1:
            self._joined()
            return

        fragments, channels = self.fragments, _Channels(self)
        first = [self.channel(fragments.first_column(n)) for n in range(fragments.down)]
        channels.hold(first)

        def some(row: Expr, sums: Callable[[], Any]) -> None:
            pixel = self.first + row
            with tir.when(pixel < self.total):
                for n, _, both in sums():
                    channels.store([total for total, _, _ in both], pixel, first[n], n)

        fragments.each_row(some)

    def _joined(self) -> None:
        tile = self.tile
        size = tile.rows * tile.columns
        between = device.shared(tile.splits * size, "int32")

        def some(row: Expr, sums: Callable[[], Any]) -> None:
            for _, column, both in sums():
                for i, (total, _, _) in enumerate(both):
                    place = self.group * size + row * tile.columns + column + i
                    tir.store(between, total, [place])

        self.fragments.each_row(some)
        device.barrier()
        channels, pairs = _Channels(self), size // 2 // tile.threads
        thread = self.group * tile.group + self.thread
        places = [(thread + i * tile.threads) * 2 for i in range(pairs)]
        first = [self.channel(place % tile.columns) for place in places]
        channels.hold(first)
        for i, place in enumerate(places):
            totals = [between[place], between[place + 1]]
            for split in range(1, tile.splits):
                totals = [total + between[place + j + split * size] for j, total in enumerate(totals)]
            pixel = self.first + place // tile.columns
            with tir.when(pixel < self.total):
                channels.store(totals, pixel, first[i], i)


class _Channels:
    """The epilogue of pairs of neighbouring channels, whose numbers are read once for all pixels.

    Parameters
    ----------
    emitter : ProductEmitter
        What writes the kernel.
    """

    def __init__(self, emitter: ProductEmitter) -> None:
        self.emitter, self.count = emitter, emitter.conv.out_channels
        self.paired = self.count % 2 == 0
        self.held: dict[str, Any] = {}

    def hold(self, channels: Sequence[Expr]) -> None:
        """Read the numbers of the pairs that begin at these channels."""
        if not self.paired:
            return
        for name in CHANNELWISE:
            buffer = self.emitter.buffers[name]
            self.held[name] = device.local(2 * len(channels), buffer.dtype)
            for n, channel in enumerate(channels):
                there = channel
                if self.count % self.emitter.tile.columns:
                    # Counting in pairs shows TVM that the load is aligned.
                    there = tir.smaller(channel // 2, self.count // 2 - 1) * 2
                tir.store(self.held[name], tir.load(buffer, [there], 2), [2 * n], 2)

    def store(self, totals: Sequence[Expr], pixel: Expr, channel: Expr, n: int) -> None:
        """Store the sums of the n-th pair, whose first channel is `channel`."""
        emitter, epilogue = self.emitter, self.emitter.conv.epilogue
        outputs = [emitter.buffers[f"output{i}"] for i in range(len(epilogue.outputs))]
        for i in range(1 if self.paired else 2):
            where = [*emitter.lead, pixel * self.count + channel + i]
            with tir.when(True if self.count % emitter.tile.columns == 0 else channel + i < self.count):
                if self.paired:
                    numbers = [[self.held[name][2 * n + j] for name in CHANNELWISE] for j in range(2)]
                    values = [scaled_sum(total, *own) for total, own in zip(totals, numbers, strict=True)]
                    finish_pair(values, epilogue, emitter.buffers.get("residual"), outputs, where)
                else:
                    finish_sum(totals[i], channel + i, emitter.buffers, epilogue, outputs, where)
