"""What the quantization did, layer by layer: data without behaviour, JSON-able."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

__all__ = ["LayerReport", "QuantReport"]


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
class QuantReport:
    """Result of :func:`cat_plugin.ptq.quantize`.

    Attributes
    ----------
    layers : list of LayerReport
        In the order of execution.
    unquantized : list of str
        Layers and operations that stay in floating point, each with the reason.
    spec : dict
        The specification used.
    num_samples : int
        Calibration inputs used.
    seconds : float
        Wall-clock time.
    notes : list of str
        Whatever else the user should know.
    """

    layers: list[LayerReport] = field(default_factory=list)
    unquantized: list[str] = field(default_factory=list)
    spec: dict[str, Any] = field(default_factory=dict)
    num_samples: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain, JSON-able values."""
        return dataclasses.asdict(self)

    @property
    def weight_bits_total(self) -> int:
        """Size of all quantized weights in bits."""
        total = 0
        for layer in self.layers:
            count = 1
            for size in layer.weight_shape:
                count *= size
            total += count * layer.w_bits
        return total
