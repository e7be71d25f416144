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
_CHOICES = {
    "preset": ("fast", "balanced", "best"),
    "rounding": ("straight_through", "adaround", "none"),
    "unit": ("layer", "block", "pack"),
    "loss": ("mse", "fisher"),
}
_RANGES = {
    "drop_probability": (0.0, 1.0),
    "input_mix": (0.0, 1.0),
    "guidance": (0.0, 1e6),
    "refinement_penalty": (0.0, 1e6),
    "temperature": (1e-3, 1e3),
    "weight_budget": (2.0, 8.0),
}


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
    attention_bits : int or None, default=None
        Bits of the inputs of products of two activations (queries, keys, values, attention); None leaves them in
        float.
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
    compensation : bool, default=True
        Error-compensated rounding (:mod:`cat_plugin.ptq.closed_form.compensation`) instead of rounding to nearest.
    refit : bool, default=True
        Least-squares refit of the weights to quantized inputs before rounding (only with ``compensation``).
    bias_correction : bool, default=True
        See :mod:`cat_plugin.ptq.closed_form.bias_correction`.
    equalization : bool or None, default=None
        See :mod:`cat_plugin.ptq.transforms.equalization`; None for models with depthwise convolutions.
    rounding : {"straight_through", "adaround", "none"}, default="straight_through"
        How the rounding is learned (:mod:`cat_plugin.ptq.learned.rounding`).
    learned_steps : bool, default=True
        Learn activation steps with it (:mod:`cat_plugin.ptq.learned.steps`).
    drop_probability : float, default=0.0
        QDrop's share of unquantized elements while units are trained (:mod:`cat_plugin.ptq.learned.steps`).
    input_mix : float, default=0.0
        Share of full-precision elements in a unit's input while it is trained.  QDrop mixes half; here the closed form
        has fitted the unit to quantized inputs already.  One unit was measured: of the output of ResNet-20's
        ``layer3.1`` at W2A2, strict, 0.397 was lost after 240 steps with half mixed in and 0.390 with none.
    unit : {"layer", "block", "pack"}, default="block"
        What is reconstructed at a time (:mod:`cat_plugin.ptq.graph.units`, :mod:`cat_plugin.ptq.graph.packs`).
    units : tuple of str, default=()
        Name patterns of modules that are to be one unit each.
    unit_steps : int or None, default=None
        Gradient steps for each unit; None as the preset says.
    loss : {"mse", "fisher"}, default="mse"
        Loss of the reconstruction (:mod:`cat_plugin.ptq.learned.losses`).
    guidance : float, default=0.0
        Weight of the prediction difference (PD-Quant) in a unit's loss.
    model_steps : int or None, default=None
        Gradient steps of the whole-model stage (:mod:`cat_plugin.ptq.learned.logit_training`).
    augment : bool or None, default=None
        Varied inputs (:mod:`cat_plugin.ptq.learned.augment`) in that stage and the refinement; None for what looks like
        images.
    refinement_steps : int or None, default=None
        Gradient steps of CAT's refinement (:mod:`cat_plugin.ptq.learned.refinement`).
    refinement_penalty : float, default=0.01
        Its ``lambda_p``.
    temperature : float, default=2.0
        ``T`` of the divergence in both.
    weight_budget : float or None, default=None
        Mean bits of a weight that ``w_bits`` is replaced by, chosen for each unit
        (:mod:`cat_plugin.ptq.closed_form.mixed_precision`).
    weight_candidates : tuple of int, default=(2, 3, 4, 6, 8)
        Bit-widths to choose from.
    memory_mb : int or None, default=None
        What cached activations may take, in MiB; beyond, they lie in files mapped into memory.
    bf16 : bool or None, default=None
        BF16 convolutions in training passes (:mod:`cat_plugin.ptq.learned.precision`); None where the processor has it.

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
    attention_bits: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    skip: tuple[str, ...] = ()
    symmetric_weights: bool = False
    symmetric_activations: bool = False
    num_samples: int = 1024
    batch_size: int = 64
    seed: int = 0
    compensation: bool = True
    refit: bool = True
    bias_correction: bool = True
    equalization: bool | None = None
    rounding: str = "straight_through"
    learned_steps: bool = True
    drop_probability: float = 0.0
    input_mix: float = 0.0
    unit: str = "block"
    units: tuple[str, ...] = ()
    unit_steps: int | None = None
    loss: str = "mse"
    guidance: float = 0.0
    model_steps: int | None = None
    augment: bool | None = None
    refinement_steps: int | None = None
    refinement_penalty: float = 0.01
    temperature: float = 2.0
    weight_budget: float | None = None
    weight_candidates: tuple[int, ...] = (2, 3, 4, 6, 8)
    memory_mb: int | None = None
    bf16: bool | None = None

    def __post_init__(self) -> None:
        for name in ("w_bits", "a_bits", "residual_bits", "branch_bits"):
            _check_bits(name, getattr(self, name))
        for name in ("first_bits", "last_bits", "attention_bits"):
            if getattr(self, name) is not None:
                _check_bits(name, getattr(self, name))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise CATValueError(
                    f"{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}."
                )
        for name in ("num_samples", "batch_size"):
            self._check_count(name, 1)
        for name in ("unit_steps", "model_steps", "refinement_steps", "memory_mb"):
            if getattr(self, name) is not None:
                self._check_count(name, 0)
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and low <= value <= high):
                raise CATValueError(f"{name} is {value!r}; expected a number from {low} to {high}.")
        for name in ("skip", "units", "weight_candidates"):
            if isinstance(getattr(self, name), str):
                raise CATTypeError(f"{name} is the string {getattr(self, name)!r}; expected a list.")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for bits in self.weight_candidates:
            _check_bits("weight_candidates", bits)
        object.__setattr__(self, "overrides", {k: self._override(k, v) for k, v in self.overrides.items()})

    def _check_count(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise CATValueError(f"{name} is {value!r}; expected an integer of at least {least}.")

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
        for name in ("skip", "units", "weight_candidates"):
            out[name] = list(out[name])
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
