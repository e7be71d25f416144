"""The tiled product by dp4a: four products of bytes an instruction in each thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tvm_backend.kernels import tir
from tvm_backend.kernels.cuda import device
from tvm_backend.kernels.cuda.epilogue import finish_sum
from tvm_backend.kernels.cuda.isa import Dp4a
from tvm_backend.kernels.cuda.packing import CHUNK
from tvm_backend.kernels.cuda.product import Product, ProductEmitter
from tvm_backend.kernels.cuda.tiles import PITCH
from tvm_backend.kernels.kernel import Machine
from tvm_backend.kernels.spec import WeightedSpec
from tvm_backend.kernels.tir import Expr

__all__ = ["Dp4aProduct"]


@dataclass(frozen=True)
class Dp4aProduct(Product):
    """Generator of a convolution or a linear layer by dp4a."""

    tensor_cores: ClassVar[bool] = False

    @classmethod
    def takes(cls, spec: WeightedSpec, isa: Machine) -> bool:
        """Whether the device has such products."""
        return isinstance(isa, Dp4a)

    def emitter(
        self, buffers: dict[str, Any], total: Expr, block: list[Expr], thread: Expr
    ) -> ProductEmitter:
        """What writes the body."""
        return _Emitter(self, buffers, total, block, thread)


class _Emitter(ProductEmitter):
    """Writes the body of one kernel."""

    def _share(self) -> tuple[int, int]:
        """Rows and columns of a thread."""
        return self.tile.rows // (self.tile.threads // 16), self.tile.columns // 16

    def begin(self) -> None:
        """Registers for the thread's sums."""
        rows, columns = self._share()
        self.sums = device.local(rows * columns, "int32")
        for i in range(rows * columns):
            tir.store(self.sums, tir.constant(0, "int32"), [i])

    def multiply(self) -> None:
        """Sixteen products of each sum at a time, by words of four."""
        rows, columns = self._share()
        row, column = self.thread // 16 * rows, self.thread % 16
        a, b = device.local(4 * rows, "int32"), device.local(4, "int32")
        name = "__dp4a" if self.conv.input.signed else "cat_dp4a_u8"
        with tir.loop(CHUNK // 16) as step:
            for i in range(rows):
                place = (row + i) * PITCH + step * 4
                tir.store(a, tir.load(self.left, [place], 4), [4 * i], 4)
            for j in range(columns):
                place = (column + 16 * j) * PITCH + step * 4
                tir.store(b, tir.load(self.right, [place], 4), [0], 4)
                for i in range(rows):
                    slot = i * columns + j
                    for word in range(4):
                        total = device.call("int32", name, a[4 * i + word], b[word], self.sums[slot])
                        tir.store(self.sums, total, [slot])

    def finish(self) -> None:
        """A thread holds some neighbouring rows of every sixteenth column."""
        rows, columns = self._share()
        for i in range(rows):
            pixel = self.first + self.thread // 16 * rows + i
            with tir.when(pixel < self.total):
                for j in range(columns):
                    self._store(self.sums[i * columns + j], pixel, self.channel(self.thread % 16 + 16 * j))

    def _store(self, total: Expr, pixel: Expr, channel: Expr) -> None:
        conv = self.conv
        outputs = [self.buffers[f"output{i}"] for i in range(len(conv.epilogue.outputs))]
        where = [*self.lead, pixel * conv.out_channels + channel]
        with tir.when(True if conv.out_channels % self.tile.columns == 0 else channel < conv.out_channels):
            finish_sum(total, channel, self.buffers, conv.epilogue, outputs, where)
