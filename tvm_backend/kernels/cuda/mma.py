"""The tiled product by tensor cores: int8 ``mma`` of a warp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tvm_backend.kernels import tir
from tvm_backend.kernels.cuda import device
from tvm_backend.kernels.cuda.isa import TensorCores
from tvm_backend.kernels.cuda.packing import CHUNK
from tvm_backend.kernels.cuda.product import PITCH, Product, ProductEmitter
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

    def _corner(self) -> tuple[Expr, Expr]:
        """First row and column of the warp's part of the tile."""
        along_rows, along_columns = self.tile.warps
        rows, columns = self.tile.rows // along_rows, self.tile.columns // along_columns
        return self.warp // along_columns * rows, self.warp % along_columns * columns

    def multiply(self) -> None:
        """Fragments of 16 by 8 sums, 32 products at a time."""
        across, down = self.tile.fragments
        row, column = self._corner()
        group, member = self.lane // 4, self.lane % 4
        a, b = device.local(4 * across, "int32"), device.local(2, "int32")
        name = "cat_mma_s8" if self.conv.input.signed else "cat_mma_u8"
        for step in range(CHUNK // 32):
            word = step * 8 + member
            for m in range(across):
                for i in range(4):
                    place = (row + m * 16 + group + i % 2 * 8) * PITCH + word + i // 2 * 4
                    tir.store(a, self.left[place], [4 * m + i])
            for n in range(down):
                for i in range(2):
                    place = (column + n * 8 + group) * PITCH + word + i * 4
                    tir.store(b, self.right[place], [i])
                for m in range(across):
                    device.emit(name, (self.sums, (m * down + n) * 4), (a, 4 * m), (b, 0))

    def finish(self) -> None:
        """Each lane holds two neighbouring columns of two rows of a fragment."""
        across, down = self.tile.fragments
        row, column = self._corner()
        group, member = self.lane // 4, self.lane % 4
        for m in range(across):
            for half in range(2):
                pixel = self.first + row + m * 16 + group + half * 8
                with tir.when(pixel < self.total):
                    for n in range(down):
                        for i in range(2):
                            channel = column + n * 8 + member * 2 + i
                            self.store(self.sums[(m * down + n) * 4 + 2 * half + i], pixel, channel)
