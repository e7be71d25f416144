"""The numbers of a quantization as generated code sees them: constants in the code, or elements of an argument.

Layers of equal shape mostly differ in scales and zero points only.  Read from an argument these leave the code alone, so
such layers share one kernel, within a library and, once it is compiled, between libraries.  What a number makes of
the code is fixed: its type, whether there is a zero point to add, and which bounds saturation does not take care of.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_backend.kernels import tir
from tvm_backend.kernels.spec import Epilogue, QParams, TensorKind, WeightedSpec
from tvm_backend.kernels.tir import Expr

__all__ = ["EACH", "Finish", "Kind", "Quantity", "form_of", "numbers_of", "quantities"]

EACH = 5
"""Numbers of a quantization: zero point, step, its inverse, lower and upper bound."""

Clip = tuple[float | None, float | None]
_PLAIN: Clip = (None, None)


def _bounds(kind: QParams, clip: Clip) -> tuple[np.float32, np.float32]:
    """The smallest and largest value that is stored, in steps from zero.

    Multiplication by a positive constant is monotone even after rounding, so clipping to ``[a, b]`` first equals
    clipping to ``[fl(a * inverse), fl(b * inverse)]`` afterwards; activation and saturation become one pair of bounds.
    """
    inverse, (low, high) = np.float32(kind.inverse), clip
    least, most = np.float32(kind.qmin - kind.zero_point), np.float32(kind.qmax - kind.zero_point)
    if low is not None:
        least = np.clip(np.float32(low) * inverse, least, most)
    if high is not None:
        most = np.clip(np.float32(high) * inverse, least, most)
    return least, most


def _needed(kind: QParams, clip: Clip, bounded: bool) -> tuple[bool, bool]:
    """Which of the bounds a narrowing that saturates does not hold by itself.

    The lower one is left to it where it is the storage type's own, the upper one where the value is `bounded` as well,
    since the conversion of a larger one gives the most negative integer.
    """
    least, most = _bounds(kind, clip)
    lowest, highest = (-128, 127) if kind.signed else (0, 255)
    # Far below the range the conversion gives the most negative integer, which must not wrap around.
    saturates = bounded or kind.zero_point >= 0
    above = not saturates or np.rint(least) > lowest - kind.zero_point
    below = not bounded or np.rint(most) < highest - kind.zero_point
    return bool(above), bool(below)


@dataclass(frozen=True)
class Quantity:
    """One quantization in code.

    Parameters
    ----------
    dtype : str
        How a value is stored.
    zero : Expr or None
        The zero point, int32; None where there is none to add.
    step, inverse : Expr or None
        The scale and its inverse, float32; None for one.
    least, most : Expr
        Bounds of the values in steps from zero, activation included, float32.
    above, below : bool
        Whether these bounds have to be held even where narrowing saturates.
    """

    dtype: str
    zero: Expr | None
    step: Expr | None
    inverse: Expr | None
    least: Expr
    most: Expr
    above: bool
    below: bool

    @classmethod
    def of(cls, kind: QParams, clip: Clip = _PLAIN, bounded: bool = False) -> Quantity:
        """Constants in the code."""
        least, most = (tir.float32(float(bound)) for bound in _bounds(kind, clip))
        zero = tir.int32(kind.zero_point) if kind.zero_point else None
        step, inverse = (None if number == 1 else tir.float32(number) for number in (kind.step, kind.inverse))
        return cls(kind.dtype, zero, step, inverse, least, most, *_needed(kind, clip, bounded))

    @classmethod
    def any(cls, kind: TensorKind, clip: Clip = _PLAIN, bounded: bool = False) -> Kind:
        """The same, or ``"float32"`` as it is."""
        return cls.of(kind, clip, bounded) if isinstance(kind, QParams) else kind

    @classmethod
    def held(cls, kind: QParams, numbers: Any, place: int, clip: Clip, bounded: bool) -> Quantity:
        """Elements of the float32 buffer `numbers`, from ``EACH * place`` on."""
        zero, step, inverse, least, most = (tir.load(numbers, [EACH * place + i]) for i in range(EACH))
        shift = tir.cast(zero, "int32") if kind.zero_point else None
        return cls(kind.dtype, shift, step, inverse, least, most, *_needed(kind, clip, bounded))


Kind = Quantity | str
"""What a tensor holds: integers with their numbers, or ``"float32"``."""


@dataclass(frozen=True)
class Finish:
    """An epilogue in code; see :class:`~tvm_backend.kernels.spec.Epilogue`."""

    clip: Clip
    residual: Kind | None
    branch: Quantity | None
    outputs: tuple[Kind, ...]

    @classmethod
    def of(cls, epilogue: Epilogue) -> Finish:
        """With constants in the code."""
        return cls(
            epilogue.clip,
            None if epilogue.residual is None else Quantity.any(epilogue.residual),
            None if epilogue.branch is None else Quantity.of(epilogue.branch),
            tuple(Quantity.any(kind, epilogue.clip, epilogue.bounded) for kind in epilogue.outputs),
        )

    @classmethod
    def held(cls, spec: WeightedSpec, numbers: Any) -> Finish:
        """With what a layer's kernel reads from the argument `numbers`, filled by :func:`numbers_of`."""
        epilogue = spec.epilogue

        def at(place: int, kind: TensorKind | None, clip: Clip = _PLAIN, bounded: bool = False) -> Any:
            return Quantity.held(kind, numbers, place, clip, bounded) if isinstance(kind, QParams) else kind

        return cls(
            epilogue.clip,
            at(0, epilogue.residual),
            at(1, epilogue.branch),
            tuple(
                at(2 + i, kind, epilogue.clip, epilogue.bounded) for i, kind in enumerate(epilogue.outputs)
            ),
        )


def quantities(spec: WeightedSpec) -> Sequence[tuple[TensorKind | None, Clip]]:
    """The quantizations of a layer's epilogue, in the order of their places: residual, branch, outputs."""
    epilogue = spec.epilogue
    outputs = [(kind, epilogue.clip) for kind in epilogue.outputs]
    return [(epilogue.residual, _PLAIN), (epilogue.branch, _PLAIN), *outputs]


def numbers_of(spec: WeightedSpec, zero: int) -> NDArray[np.float32]:
    """What the argument ``numbers`` of a layer's kernel holds: for each place its :data:`EACH` numbers, then the input's zero point.

    Parameters
    ----------
    spec : WeightedSpec
        The layer.
    zero : int
        The zero point of the activations as the kernel's instructions see them.

    Returns
    -------
    ndarray of float32, one-dimensional
    """
    values: list[float] = []
    for kind, clip in quantities(spec):
        if isinstance(kind, QParams):
            values += [kind.zero_point, kind.step, kind.inverse, *map(float, _bounds(kind, clip))]
        else:
            values += [0.0] * EACH
    return np.asarray([*values, zero], np.float32)


def form_of(spec: WeightedSpec) -> Hashable:
    """What of a layer its code depends on: everything but the numbers."""
    epilogue, form = spec.epilogue, {field.name: getattr(spec, field.name) for field in fields(spec)}  # type: ignore[arg-type]

    def plain(kind: TensorKind | None, clip: Clip = _PLAIN, bounded: bool = False) -> Hashable:
        if not isinstance(kind, QParams):
            return kind
        return kind.dtype, kind.zero_point != 0, *_needed(kind, clip, bounded)

    def read(kind: TensorKind | None) -> Hashable:  # without bounds, within which its values lie
        return (kind.dtype, kind.zero_point != 0) if isinstance(kind, QParams) else kind

    form["input"], form["weight_bits"] = spec.input.dtype, spec.storage_bits
    form["epilogue"] = (
        epilogue.clip if "float32" in epilogue.outputs else None,
        read(epilogue.residual),
        plain(epilogue.branch),
        tuple(plain(kind, epilogue.clip, epilogue.bounded) for kind in epilogue.outputs),
    )
    return type(spec).__name__, tuple(sorted(form.items()))
