"""The specification of rotations by Hadamard matrices, which quantized transformers compute in front of some layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tvm_backend.kernels.spec.base import Argument, EpilogueSpec, Operand
from tvm_backend.kernels.spec.values import Epilogue, check_batch, check_positive, require

__all__ = ["RotationSpec"]


@dataclass(frozen=True)
class RotationSpec(EpilogueSpec):
    """Rows (N, features) of float32 times ``diag(factors) (H x C x H)``; arguments: data, factors (features,), core, outputs.

    ``H`` are Sylvester's Hadamard matrices of `outer` and `inner` rows, whose products take additions alone, a logarithm of their
    size for each feature; ``C``, the argument `core` (core, core), is whatever remains, and is left out where `core` is 1.  The cross stands for Kronecker's
    product, so that ``features = outer core inner``.

    Each result differs from the exact one by at most ``2**-24 (1 + log2(outer inner) + core)`` times the sum of the magnitudes that are
    added up in it.

    Parameters
    ----------
    batch : int or None
        Number of rows; None makes it a run-time value.
    outer, core, inner : int
        Sizes of the three matrices; the first and the last are powers of two.
    epilogue : Epilogue
        Clip and outputs; `residual` must be None.
    """

    operation: ClassVar[str] = "rotation"

    batch: int | None
    outer: int
    core: int
    inner: int
    epilogue: Epilogue

    def __post_init__(self) -> None:
        check_batch(self.batch)
        check_positive(self, "outer", "core", "inner")
        for size in (self.outer, self.inner):
            require(size & (size - 1) == 0, f"{size} is not a power of two")
        require(self.epilogue.residual is None, "nothing is added to a rotation")

    @property
    def features(self) -> int:
        """Length of a row."""
        return self.outer * self.core * self.inner

    @property
    def name(self) -> str:
        """The sizes of its matrices."""
        return f"rotation_{self.outer}x{self.core}x{self.inner}"

    @property
    def reads(self) -> tuple[Operand, ...]:
        """The rows."""
        return (Operand("data", (self.features,), "float32"),)

    @property
    def out_shape(self) -> tuple[int]:
        """That of a row."""
        return (self.features,)

    def arguments(self, batch: Any) -> list[Argument]:
        """The arguments, in order."""
        data, *outputs = super().arguments(batch)
        core: list[Argument] = [("core", (self.core, self.core), "float32")] if self.core > 1 else []
        return [data, ("factors", (self.features,), "float32"), *core, *outputs]
