"""What the quantization did, layer by layer: data without behaviour, JSON-able."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

__all__ = ["LayerReport", "QuantReport", "UnitReport"]


_NAMED = 3  # units in one line of the summary


def _first(note: str, more: int) -> str:
    return f"{note} (and {more} more of the kind)" if more else note


@dataclass
class LayerReport:
    """One quantized layer.

    Attributes
    ----------
    name, kind : str
        Qualified name in the user's model and ``conv1d``, ``conv2d`` or ``linear``.
    w_bits, a_bits : int
        Bits of the weights and of the input.
    weight_shape : tuple of int
        Shape of the weight.
    loss_before, loss_after : float or None
        Mean squared difference of the layer's output to full precision over the mean square of the
        full-precision output: with weights rounded to nearest, and as delivered.
    """

    name: str
    kind: str
    w_bits: int
    a_bits: int
    weight_shape: tuple[int, ...]
    loss_before: float | None = None
    loss_after: float | None = None


@dataclass
class UnitReport:
    """One trained stage.

    Attributes
    ----------
    name : str
        Of the unit; ``model`` and ``refinement`` for the stages on the logits.
    kind : str
        ``unit``, ``model`` or ``refinement``.
    loss_before, loss_after : float
        Relative mean squared error of the unit's output, or divergence of the logits.
    steps : int
        Gradient steps taken.
    note : str
        Why it kept its initial values, if it did.
    """

    name: str
    kind: str
    loss_before: float
    loss_after: float
    steps: int
    note: str = ""


@dataclass
class QuantReport:
    """Result of :func:`cat_plugin.ptq.quantize`.

    Attributes
    ----------
    layers : list of LayerReport
        In the order of execution.
    units : list of UnitReport
        What was trained, in order.
    unquantized : list of str
        Layers and operations that stay in floating point, each with the reason.
    spec : dict
        The specification used.
    num_samples : int
        Calibration inputs used.
    seconds : float
        Wall-clock time.
    cache : dict
        ``peak_bytes`` of cached activations in memory, ``file_bytes`` written to files.
    notes : list of str
        Whatever else the user should know.
    """

    layers: list[LayerReport] = field(default_factory=list)
    units: list[UnitReport] = field(default_factory=list)
    unquantized: list[str] = field(default_factory=list)
    spec: dict[str, Any] = field(default_factory=dict)
    num_samples: int = 0
    seconds: float = 0.0
    cache: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain, JSON-able values."""
        return dataclasses.asdict(self)

    def summary(self) -> list[str]:
        """The notes in few lines: what is said of several units, or begins alike, is one line with their number."""
        units: dict[str, list[str]] = {}
        for unit in self.units:
            if unit.note:
                units.setdefault(unit.note, []).append(unit.name)
        own = {f"{unit.kind} {unit.name}: {unit.note}" for unit in self.units}
        alike: dict[str, list[str]] = {}
        for note in self.notes:
            if note not in own:
                alike.setdefault(note.partition(": ")[0], []).append(note)
        lines = [_first(notes[0], len(notes) - 1) for notes in alike.values()]
        for note, names in units.items():
            some = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
            lines.append(f"{note}, in {len(names)} of {len(self.units)} trained units ({some})")
        return lines

    @property
    def weight_bits_total(self) -> int:
        """Size of all quantized weights in bits."""
        return sum(math.prod(layer.weight_shape) * layer.w_bits for layer in self.layers)
