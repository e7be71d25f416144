"""The specification of float32 functions of rows: what transformers have between their products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from tvm_backend.kernels.spec.base import Argument, EpilogueSpec, Operand
from tvm_backend.kernels.spec.values import Epilogue, check_batch, check_positive, require

__all__ = ["RowsSpec"]


@dataclass(frozen=True)
class RowsSpec(EpilogueSpec):
    """A function of rows (N, features) of float32; arguments: data, constants (features,), outputs.

    Constants are scale and bias for ``layer_norm``, the scale for ``rms_norm``.

    Results differ from the exact function by a few roundings of float32; :mod:`tvm_backend.kernels.cpu.rows` says by how much.

    Parameters
    ----------
    batch : int or None
        Number of rows; None makes it a run-time value.
    features : int
        Length of a row.
    function : {"softmax", "layer_norm", "rms_norm", "gelu", "gelu_tanh"}
        What is computed; the last two are functions of each number.
    epilogue : Epilogue
        Clip and outputs; `residual` must be None.
    epsilon : float
        What ``layer_norm`` adds to the variance, and ``rms_norm`` to the mean square.
    """

    operation: ClassVar[str] = "rows"

    batch: int | None
    features: int
    function: Literal["softmax", "layer_norm", "rms_norm", "gelu", "gelu_tanh"]
    epilogue: Epilogue
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        check_batch(self.batch)
        check_positive(self, "features")
        require(
            self.function in ("softmax", "layer_norm", "rms_norm", "gelu", "gelu_tanh"),
            f"there is no function of rows called {self.function!r}",
        )
        require(self.epilogue.residual is None, "nothing is added to a function of rows")
        require(self.epsilon >= 0, f"epsilon={self.epsilon} must be 0 or more")

    @property
    def name(self) -> str:
        """What it computes, and the length of a row."""
        return f"{self.function}_{self.features}"

    @property
    def reads(self) -> tuple[Operand, ...]:
        """The rows."""
        return (Operand("data", (self.features,), "float32"),)

    @property
    def out_shape(self) -> tuple[int]:
        """That of a row."""
        return (self.features,)

    @property
    def constants(self) -> tuple[str, ...]:
        """The names of the constants that it takes, each with a number for every feature."""
        return {"layer_norm": ("scale", "bias"), "rms_norm": ("scale",)}.get(self.function, ())

    def arguments(self, batch: Any) -> list[Argument]:
        """The arguments, in order."""
        data, *outputs = super().arguments(batch)
        constants: list[Argument] = [(name, (self.features,), "float32") for name in self.constants]
        return [data, *constants, *outputs]
