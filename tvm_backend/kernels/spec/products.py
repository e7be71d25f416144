"""The specification of products of matrices that are both computed at run time, as attention has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tvm_backend.kernels.spec.base import Argument, EpilogueSpec, Operand
from tvm_backend.kernels.spec.values import (
    Epilogue,
    QParams,
    TensorKind,
    check_batch,
    check_kind,
    check_positive,
    require,
)

__all__ = ["ProductSpec"]


@dataclass(frozen=True)
class ProductSpec(EpilogueSpec):
    """Pairs of matrices multiplied: (N, rows, inner) with (N, inner, columns); arguments: left, right, outputs.

    Products of integers are summed exactly, and the sum is multiplied by ``float32(left scale * right scale)``; products of float32 are
    summed in float32 in any order.

    Parameters
    ----------
    batch : int or None
        Number of pairs; None makes it a run-time value.
    rows, inner, columns : int
        Sizes of the matrices.
    inputs : tuple of two (QParams or "float32")
        How the matrices are quantized, both or none.
    epilogue : Epilogue
        Clip and outputs; `residual` must be None.
    transposed : bool
        Whether the second matrix lies as (N, columns, inner).
    shared : bool
        Whether the first matrices are rows (N, inner), `rows` being 1, and the second is one for all of them.
    """

    operation: ClassVar[str] = "product"

    batch: int | None
    rows: int
    inner: int
    columns: int
    inputs: tuple[TensorKind, TensorKind]
    epilogue: Epilogue
    transposed: bool = False
    shared: bool = False

    def __post_init__(self) -> None:
        check_batch(self.batch)
        check_positive(self, "rows", "inner", "columns")
        for kind in self.inputs:
            check_kind(kind, "a matrix")
        require(
            len({isinstance(kind, QParams) for kind in self.inputs}) == 1,
            f"both matrices are quantized or none is, not {self.inputs!r}",
        )
        require(not self.shared or self.rows == 1, f"rows={self.rows} of each batch cannot share a matrix")
        require(self.epilogue.residual is None, "nothing is added to a product of matrices")
        require(
            self.inner <= (1 << 31) // (255 * 255),
            f"sums of {self.inner} products do not fit into 32 bits",
        )

    @property
    def integers(self) -> bool:
        """Whether the matrices are quantized."""
        return isinstance(self.inputs[0], QParams)

    @property
    def factor(self) -> float:
        """What an integer sum is multiplied by."""
        left, right = self.inputs
        assert isinstance(left, QParams)
        assert isinstance(right, QParams)
        return float(np.float32(left.scale * right.scale))

    @property
    def name(self) -> str:
        """What it computes: the sizes."""
        return f"product_{self.rows}_{self.inner}_{self.columns}"

    @property
    def reads(self) -> tuple[Operand, ...]:
        """The matrices."""
        right = (self.columns, self.inner) if self.transposed else (self.inner, self.columns)
        return (
            Operand("left", (self.inner,) if self.shared else (self.rows, self.inner), self.inputs[0]),
            Operand("right", right, self.inputs[1]),
        )

    def arguments(self, batch: Any) -> list[Argument]:
        """The arguments, in order."""
        left, (name, shape, dtype), *outputs = super().arguments(batch)
        return [left, (name, shape[1:] if self.shared else shape, dtype), *outputs]

    @property
    def out_shape(self) -> tuple[int, ...]:
        """(rows, columns), or (columns,) of a shared one."""
        return (self.columns,) if self.shared else (self.rows, self.columns)

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations for one pair."""
        return self.rows * self.inner * self.columns

    @property
    def operations(self) -> int:
        """Multiplications and additions for one pair."""
        return 2 * self.macs
