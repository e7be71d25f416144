"""The tiled product by tensor cores: int8 ``mma`` of a warp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm_backend.kernels import tir
from tvm_backend.kernels.cuda import device
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

        def some(row: Expr, sums: Callable[[], Any]) -> None:
            pixel = self.first + row
            with tir.when(pixel < self.total):
                for column, total, _, _ in sums():
                    self.store(total, pixel, column)

        self.fragments.each_row(some)

    def _joined(self) -> None:
        tile = self.tile
        size = tile.rows * tile.columns
        between = device.shared(tile.splits * size, "int32")

        def some(row: Expr, sums: Callable[[], Any]) -> None:
            for column, total, _, _ in sums():
                tir.store(between, total, [self.group * size + row * tile.columns + column])

        self.fragments.each_row(some)
        device.barrier()
        for i in range(size // tile.threads):
            place = self.group * tile.group + self.thread + i * tile.threads
            total = between[place]
            for split in range(1, tile.splits):
                total = total + between[place + split * size]
            pixel = self.first + place // tile.columns
            with tir.when(pixel < self.total):
                self.store(total, pixel, place % tile.columns)
