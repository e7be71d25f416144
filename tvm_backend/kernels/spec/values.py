"""How tensors are quantized, and what a kernel makes of a value before it is stored: parts of every specification."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cat_plugin.errors import CompileError

__all__ = [
    "Epilogue",
    "QParams",
    "TensorKind",
    "check_batch",
    "check_kind",
    "check_positive",
    "itemsize",
    "require",
    "storage_dtype",
]

_LIMITS = {"int8": (-128, 127), "uint8": (0, 255)}


def require(condition: bool, message: str) -> None:
    """Raise `message` unless `condition` holds."""
    if not condition:
        raise CompileError(message)


@dataclass(frozen=True)
class QParams:
    """Per-tensor affine quantization of an activation.

    Parameters
    ----------
    scale : float
        Step between two neighbouring values.
    zero_point : int
        The integer that stands for zero; it must be storable in `dtype`.
    qmin, qmax : int
        Smallest and largest integer in use: 0..3 for 2 bits unsigned, -8..7 for 4 bits signed.
    dtype : {"int8", "uint8"}
        How one value is stored.
    """

    scale: float
    zero_point: int
    qmin: int
    qmax: int
    dtype: Literal["int8", "uint8"]

    def __post_init__(self) -> None:
        require(self.dtype in _LIMITS, f"activations are stored as int8 or uint8, not as {self.dtype!r}")
        low, high = _LIMITS[self.dtype]
        require(
            math.isfinite(self.scale) and self.scale > 0,
            f"the scale of a quantized tensor is {self.scale}; it must be positive and finite",
        )
        require(
            low <= self.qmin < self.qmax <= high,
            f"the quantized range {self.qmin}..{self.qmax} does not fit into {self.dtype}",
        )
        require(
            low <= self.zero_point <= high,
            f"the zero point {self.zero_point} does not fit into {self.dtype}",
        )

    @property
    def signed(self) -> bool:
        """Whether the storage type is signed."""
        return self.dtype == "int8"

    @property
    def flipped(self) -> QParams:
        """The same values stored with the other sign: integers offset by 128, their highest bit turned."""
        shift = 128 if self.signed else -128
        return QParams(
            self.scale,
            self.zero_point + shift,
            self.qmin + shift,
            self.qmax + shift,
            "uint8" if self.signed else "int8",
        )

    @property
    def inverse(self) -> float:
        """``1 / scale`` rounded to float32, the factor that torch quantizes with."""
        return float(np.float32(1.0 / self.scale))

    @property
    def step(self) -> float:
        """The scale rounded to float32."""
        return float(np.float32(self.scale))


TensorKind = QParams | Literal["float32"]
"""What a tensor holds: integers with their parameters, or float32."""


def storage_dtype(kind: TensorKind) -> str:
    """The element type in which a tensor of this kind is stored."""
    return kind.dtype if isinstance(kind, QParams) else "float32"


def itemsize(kind: TensorKind) -> int:
    """Bytes of an element of a tensor of this kind."""
    return 1 if isinstance(kind, QParams) else 4


def check_kind(kind: object, what: str) -> None:
    """Require that `kind` says what a tensor holds; `what` names the tensor."""
    require(
        isinstance(kind, QParams) or kind == "float32",
        f"{what} must be QParams or 'float32', not {kind!r}",
    )


@dataclass(frozen=True)
class Epilogue:
    """What happens to a float32 value before it is stored.

    Parameters
    ----------
    clip : tuple of (float or None), optional
        Lower and upper bound of the activation function: ``(0.0, None)`` is ReLU, ``(0.0, 6.0)`` ReLU6.
    residual : QParams or "float32" or None, optional
        A further input of the output's shape, added before the clip.
    branch : QParams or None, optional
        The value is quantized and dequantized with these parameters before the residual is added: what a graph says
        that quantizes both summands of an addition.
    outputs : tuple of (QParams or "float32")
        What is stored; one value may be stored twice, for example at 2 bits for the next convolution and at
        8 bits for a shortcut.
    bounded : bool, optional
        Whether every value, in steps of every integer output, is known to stay within ``-2**30 .. 2**30``, so that
        conversion to int32 cannot overflow and saturation may do what a clip does.  It changes no result.
    """

    clip: tuple[float | None, float | None] = (None, None)
    residual: TensorKind | None = None
    outputs: tuple[TensorKind, ...] = ("float32",)
    branch: QParams | None = None
    bounded: bool = False

    def __post_init__(self) -> None:
        require(len(self.clip) == 2, f"clip must be a (lower, upper) pair, not {self.clip!r}")
        lower, upper = self.clip
        if lower is not None and upper is not None:
            require(lower <= upper, f"the clip range {lower}..{upper} is empty")
        require(len(self.outputs) >= 1, "a kernel needs at least one output")
        if self.residual is not None:
            check_kind(self.residual, "the residual")
        require(
            self.branch is None or isinstance(self.branch, QParams),
            f"the branch must be QParams or None, not {self.branch!r}",
        )
        for output in self.outputs:
            check_kind(output, "an output")


def check_positive(spec: object, *names: str) -> None:
    """Require that the named attributes are positive integers, or tuples of them."""
    for name in names:
        value = getattr(spec, name)
        for item in value if isinstance(value, tuple) else (value,):
            require(
                isinstance(item, int) and item >= 1,
                f"{type(spec).__name__}.{name} must be positive, not {value!r}",
            )


def check_batch(batch: int | None) -> None:
    """Require a batch size, or None for any."""
    require(batch is None or batch >= 1, f"the batch size must be positive, or None for any, not {batch!r}")
