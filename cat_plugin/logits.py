"""Which result of a model is logits, and along which of its axes the classes lie: declared once, for engine and correction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from cat_plugin.expectations import nearest
from cat_plugin.options import option

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Axis", "LogitsOf", "OutputName", "as_rows", "class_axis_option", "from_rows", "logits_option"]

OutputName = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if type(value) is int and value >= 0 else value),
    Field(strict=True, min_length=1),
    WithJsonSchema({"anyOf": [{"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}]}),
]
"""Name of one of a model's results, or its number."""

Axis = Annotated[int, Field(strict=True)]


def logits_option() -> Any:
    """The option that says which result is logits."""
    return option(
        default=None,
        doc="""
        Name or number of the result that is logits, where there are several or it is not (N, C).  It is what the correction
        corrects; without it such a model is quantized and not corrected.  The engine measures its error by the divergence of
        the softmax, and that of other results by the squared error.
        """,
        since="0.2",
    )


def class_axis_option() -> Any:
    """The option that says where the classes are in it."""
    return option(
        default=None,
        doc="Axis of the classes in ``logits``; None is 1 in (N, C) and (N, C, H, W), and the last in (N, T, C).",
        since="0.2",
    )


@dataclass(frozen=True)
class LogitsOf:
    """What a caller says of a model's logits.

    Attributes
    ----------
    output : str or None
        Name of the result (:func:`cat_plugin.structures.names_of`), or its number among all leaves; None is the only one.
    class_axis : int or None
        Its axis of classes; None as :meth:`axis` says.
    """

    output: str | None = None
    class_axis: int | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> LogitsOf:
        """What a configuration says, by its keys ``logits`` and ``class_axis``."""
        output = options.get("logits")
        return cls(None if output is None else str(output), options.get("class_axis"))

    @property
    def given(self) -> bool:
        """Whether anything is said."""
        return self.output is not None or self.class_axis is not None

    def find(self, names: Sequence[str]) -> int | None:
        """The place of the result among the leaves that have these names; None where there is none."""
        if self.output is None:
            return 0 if len(names) == 1 else None
        if self.output in names:
            return list(names).index(self.output)
        return int(self.output) if self.output.isdecimal() and int(self.output) < len(names) else None

    def axis(self, ndim: int) -> int | None:
        """The axis of classes, from 1 on, of a result with so many axes; None where it has no such axis."""
        axis = self.class_axis if self.class_axis is not None else 2 if ndim == 3 else 1
        return axis % ndim if -ndim < axis < ndim and axis % ndim else None

    def missing(self, names: Sequence[str]) -> str:
        """Say that no result of these names can be meant."""
        return (
            f"the model has no output {self.output!r} of real numbers with a row for each input; "
            f"{nearest(self.output, names)}"
        )

    def no_axis(self, name: str, ndim: int) -> str:
        """Say that a result has no such axis of classes."""
        return (
            f"class_axis={self.class_axis} is no axis of classes of the output {name!r} with {ndim} axes, of which the first "
            f"is the batch; expected one from 1 to {ndim - 1}."
        )


def as_rows(z: Tensor, axis: int) -> Tensor:
    """Logits (N, ..., C, ...) with their classes along `axis` as (rows, C)."""
    if z.ndim == 2:
        return z
    moved = z if axis == z.ndim - 1 else z.movedim(axis, -1)
    return moved.reshape(-1, z.shape[axis])


def from_rows(rows: Tensor, z: Tensor, axis: int) -> Tensor:
    """What :func:`as_rows` made of `z`, in the shape of `z` again."""
    if z.ndim == 2:
        return rows
    sizes = list(z.shape[1:])
    sizes.append(sizes.pop(axis - 1))
    moved = rows.reshape(-1, *sizes)
    return moved if axis == z.ndim - 1 else moved.movedim(-1, axis)
