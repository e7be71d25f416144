"""What to quantize and how: :class:`QuantSpec`, validated once when it is made."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cat_plugin.errors import CATTypeError, CATValueError

__all__ = ["LayerOverride", "QuantSpec"]

_OVERRIDE_KEYS = ("w_bits", "a_bits", "skip")


def _check_bits(name: str, bits: Any) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise CATTypeError(f"{name} is {bits!r}; expected an integer from 2 to 8.")
    if not 2 <= bits <= 8:
        raise CATValueError(f"{name} is {bits}; expected 2 to 8 bits. Choose a bit-width in that range.")


@dataclass(frozen=True)
class LayerOverride:
    """Bit-widths for the layers whose name matches a pattern.

    Parameters
    ----------
    w_bits, a_bits : int or None
        Bits of the weights and of the layer's input; None keeps the model-wide value.
    skip : bool
        Leave the layer in floating point.
    """

    w_bits: int | None = None
    a_bits: int | None = None
    skip: bool = False

    def __post_init__(self) -> None:
        for name in ("w_bits", "a_bits"):
            if getattr(self, name) is not None:
                _check_bits(f"overrides: {name}", getattr(self, name))


@dataclass(frozen=True)
class QuantSpec:
    """Description of a low-bit post-training quantization.

    Parameters
    ----------
    w_bits, a_bits : int, default=4
        Bits (2..8) of the weights and of the input of every convolution and linear layer.
    preset : {"fast", "balanced", "best"}, default="balanced"
        How much work is spent: ``fast`` is closed form only, the others train the rounding.
    first_bits, last_bits : int or None, default=8
        Weight and input bits of the first and the last layers; None treats them like all others.
    residual_bits : int, default=8
        Bits of the tensors that feed an element-wise operation, a concatenation or a pooling: what is kept in
        memory beside the layers' inputs.  ``residual_bits=a_bits`` is the strict convention of the literature, in
        which a block's output has one quantizer for the next layer and the shortcut.
    branch_bits : int, default=8
        The same where the tensor is a layer's own output, requantized inside that layer's kernel.
    overrides : mapping of str to mapping, default={}
        Shell-style name pattern -> ``{"w_bits": .., "a_bits": .., "skip": ..}``; the last match wins.
    skip : tuple of str, default=()
        Name patterns of layers that stay in floating point.
    symmetric_weights : bool, default=False
        Zero points of the weights are 0.  At 8 bits they always are; below, a zero point costs nothing at run time
        (the difference to it fits into int8) and at 2 and 3 bits much is gained by it.
    symmetric_activations : bool, default=False
        Signed activations have zero point 0; otherwise it is searched.
    num_samples : int, default=1024
        Calibration inputs used at most.
    batch_size : int, default=64
        Inputs per forward pass while calibrating.
    seed : int, default=0
        Seed of every random choice.

    Raises
    ------
    CATValueError, CATTypeError
        On a value that cannot be used.
    """

    w_bits: int = 4
    a_bits: int = 4
    preset: str = "balanced"
    first_bits: int | None = 8
    last_bits: int | None = 8
    residual_bits: int = 8
    branch_bits: int = 8
    overrides: Mapping[str, Any] = field(default_factory=dict)
    skip: tuple[str, ...] = ()
    symmetric_weights: bool = False
    symmetric_activations: bool = False
    num_samples: int = 1024
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("w_bits", "a_bits", "residual_bits", "branch_bits"):
            _check_bits(name, getattr(self, name))
        for name in ("first_bits", "last_bits"):
            if getattr(self, name) is not None:
                _check_bits(name, getattr(self, name))
        presets = ("fast", "balanced", "best")
        if self.preset not in presets:
            raise CATValueError(f"preset is {self.preset!r}; expected one of {', '.join(presets)}.")
        for name in ("num_samples", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise CATValueError(f"{name} is {value!r}; expected a positive integer.")
        if isinstance(self.skip, str):
            raise CATTypeError(f"skip is the string {self.skip!r}; expected a list of name patterns.")
        object.__setattr__(self, "skip", tuple(self.skip))
        object.__setattr__(self, "overrides", {k: self._override(k, v) for k, v in self.overrides.items()})

    @staticmethod
    def _override(pattern: str, value: Any) -> LayerOverride:
        if isinstance(value, LayerOverride):
            return value
        if not isinstance(value, Mapping):
            raise CATTypeError(f"overrides[{pattern!r}] is {value!r}; expected a mapping.")
        for key in value:
            if key not in _OVERRIDE_KEYS:
                near = difflib.get_close_matches(str(key), _OVERRIDE_KEYS, 1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise CATValueError(
                    f"overrides[{pattern!r}] has the unknown key {key!r}; expected "
                    f"{', '.join(_OVERRIDE_KEYS)}.{hint}"
                )
        return LayerOverride(**value)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantSpec:
        """Make a spec from a mapping; an unknown key is an error that names the nearest known one."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(known)}."
                raise CATValueError(f"unknown quantization option {key!r}.{hint}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain, JSON-able values."""
        out = dataclasses.asdict(self)
        out["overrides"] = {k: dataclasses.asdict(v) for k, v in self.overrides.items()}
        out["skip"] = list(self.skip)
        return out

    def layer_bits(self, name: str, *, first: bool, last: bool) -> tuple[int, int] | None:
        """Weight and input bits of the layer called ``name``, or None when it stays in float."""
        w_bits, a_bits = self.w_bits, self.a_bits
        if first and self.first_bits is not None:
            w_bits = a_bits = self.first_bits
        if last and self.last_bits is not None:
            w_bits = a_bits = self.last_bits
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.skip):
            return None
        for pattern, override in self.overrides.items():
            if fnmatch.fnmatchcase(name, pattern):
                if override.skip:
                    return None
                w_bits = override.w_bits if override.w_bits is not None else w_bits
                a_bits = override.a_bits if override.a_bits is not None else a_bits
        return w_bits, a_bits
