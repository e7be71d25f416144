"""What to quantize and how: :class:`QuantSpec`, the engine's options, declared and checked here and nowhere else."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import Field

from cat_plugin.errors import CATValueError
from cat_plugin.expectations import nearest
from cat_plugin.logits import Axis, OutputName, class_axis_option, logits_option
from cat_plugin.options import (
    Bits,
    Count,
    Number,
    OneOf,
    Pattern,
    Seed,
    Share,
    Steps,
    Switch,
    configuration,
    option,
    options_of,
)
from cat_plugin.ptq.presets import PRESETS, TRAINED

__all__ = ["LayerOverride", "QuantSpec"]

_Weight = Annotated[Number, Field(ge=0, le=1e6)]


@configuration
class LayerOverride:
    """Bit-widths for the layers whose name matches a pattern.

    ::

        overrides:
          "layer1.*": {w_bits: 8, a_bits: 8}
          head: {skip: true}
    """

    w_bits: Bits | None = option(
        default=None, doc="Bits of the layer's weights; None keeps the model-wide value.", since="0.1"
    )
    a_bits: Bits | None = option(
        default=None, doc="Bits of the layer's input; None keeps the model-wide value.", since="0.1"
    )
    skip: Switch = option(default=False, doc="Leave the layer in floating point.", since="0.1")


@configuration
class QuantSpec:
    """Description of a low-bit post-training quantization.

    ::

        cat:
          w_bits: 2
          a_bits: 4
          preset: balanced
          residual_bits: 4
          overrides: {"layer1.*": {w_bits: 8}}
          skip: [head]

    Raises
    ------
    CATValueError, CATTypeError
        On a value that cannot be used.
    """

    w_bits: Bits = option(
        default=4, doc="Bits of the weights of every convolution and linear layer.", since="0.1"
    )
    a_bits: Bits = option(
        default=4, doc="Bits of the input of every convolution and linear layer.", since="0.1"
    )
    a_granularity: Annotated[str, OneOf(("tensor", "token"))] = option(
        default="tensor",
        doc="""
        What shares a grid: the whole ``tensor``, chosen in calibration, or each ``token`` (the last axis), whose own range gives
        it at run time.  With ``token``, inputs of linear layers and of products are quantized so, those of convolutions as whole
        tensors, and what is only added or multiplied stays in float.
        """,
        since="0.3",
    )
    weight_groups: Annotated[int, Field(strict=True, ge=8)] | None = option(
        default=None,
        doc="Input features of a linear layer that share a scale, such as 64 or 128; None is one scale for each output channel. "
        "Where they do not divide a layer's features, the next smaller number that does is taken.",
        since="0.3",
    )
    weight_only: Switch = option(
        default=False,
        doc="Activations stay in floating point, all of them; ``a_bits`` and its like then say nothing.",
        since="0.2",
    )
    preset: Annotated[str, OneOf(tuple(PRESETS))] = option(
        default="balanced",
        doc="How much work is spent: ``fast`` trains no layer, ``balanced`` also trains the rounding of each block, "
        "``best`` the whole model on its own logits as well.",
        since="0.1",
    )
    first_bits: Bits | None = option(
        default=8,
        doc="Weight and input bits of the first layers; None treats them like all others.",
        since="0.1",
    )
    last_bits: Bits | None = option(
        default=8,
        doc="Weight and input bits of the last layers; None treats them like all others.",
        since="0.1",
    )
    depthwise_bits: Bits | None = option(
        default=8,
        doc="Input bits of depthwise layers, whose few weights cannot average errors away; None treats them like all others.",
        since="0.3",
    )
    residual_bits: Bits = option(
        default=8,
        doc="""
        Bits of the tensors that feed an element-wise operation, a concatenation or a pooling.  That is what is kept in
        memory beside the layers' inputs.  ``residual_bits=a_bits`` is the strict convention of the literature, in which a
        block's output has one quantizer for the next layer and the shortcut.  What a LayerNorm, a softmax or a product of
        attention reads stays in float, with all that is added up to it.
        """,
        since="0.1",
    )
    branch_bits: Bits = option(
        default=8,
        doc="The same where the tensor is a layer's own output, requantized inside that layer's kernel.",
        since="0.1",
    )
    attention_bits: Bits | None = option(
        default=8,
        doc="Bits of the inputs of products of two activations (queries, keys, values, the softmax's result); None leaves "
        "them in float.",
        since="0.1",
    )
    softmax_grid: Annotated[str, OneOf(("uniform", "logarithmic", "fitted"))] | None = option(
        default=None,
        doc="Grid of the softmax's result where a product reads it; ``logarithmic`` has a searched base "
        "(:mod:`cat_plugin.ptq.quantizers.logarithmic`), ``fitted`` the levels of least squared error "
        "(:mod:`cat_plugin.ptq.quantizers.tables`); None is ``fitted`` below 8 bits and ``uniform`` at 8.",
        since="0.3",
    )
    overrides: Mapping[Pattern, LayerOverride] = option(
        default={},
        doc="Shell-style name pattern to the ``w_bits``, ``a_bits`` or ``skip`` of the layers that it matches.  The last match "
        "wins.",
        since="0.1",
    )
    skip: tuple[Pattern, ...] = option(
        default=(), doc="Name patterns of layers that stay in floating point.", since="0.1"
    )
    symmetric_weights: Switch = option(
        default=False,
        doc="""
        Zero points of the weights are 0.  At 8 bits they always are; below, a zero point costs nothing at run time (the
        difference to it fits into int8) and at 2 and 3 bits much is gained by it.
        """,
        since="0.1",
    )
    bounded_sums: Annotated[str, OneOf(("pairs", "fours"))] | None = option(
        default="pairs",
        doc="""
        Round 8-bit weights of layers with 8-bit inputs such that two or four neighbours of one sign add up to 128 at most
        (:mod:`cat_plugin.ptq.quantizers.neighbours`).  Processors without VNNI then multiply bytes instead of words, exactly, a
        fifth to a third faster with ``pairs`` and another fifth with ``fours``, which cost MobileNetV2 0.3 points more; on others it
        changes nothing.  None leaves all weights free.
        """,
        since="0.3",
    )
    symmetric_activations: Switch = option(
        default=False, doc="Signed activations have zero point 0; otherwise it is searched.", since="0.1"
    )
    outputs: tuple[Pattern, ...] = option(
        default=(),
        doc="""
        Name patterns of the results whose error counts, where a model returns several; none is all of them.  A name is the
        key or field, or the number in a tuple, with dots between: ``logits``, ``1``, ``aux.0``; of an imported ONNX model its
        own.
        """,
        since="0.2",
    )
    logits: OutputName | None = logits_option()
    class_axis: Axis | None = class_axis_option()
    num_samples: Count = option(default=1024, doc="Calibration inputs used at most.", since="0.1")
    batch_size: Count = option(default=64, doc="Inputs per forward pass while calibrating.", since="0.1")
    seed: Seed = option(default=0, doc="Seed of every random choice.", since="0.1")
    compensation: Switch = option(
        default=True,
        doc="Error-compensated rounding (:mod:`cat_plugin.ptq.closed_form.compensation`) instead of rounding to nearest.",
        since="0.1",
    )
    refit: Switch = option(
        default=True,
        doc="Least-squares refit of the weights to quantized inputs before rounding (only with ``compensation``).",
        since="0.1",
    )
    position_weights: Switch | None = option(
        default=None,
        doc="Fit linear layers by how much each position (token) of their output matters to the results "
        "(:mod:`cat_plugin.ptq.closed_form.importance`); None where the results have no positions of their own.",
        since="0.3",
    )
    bias_correction: Switch = option(
        default=True,
        doc="Correct the mean that quantization moves (:mod:`cat_plugin.ptq.closed_form.bias_correction`).",
        since="0.1",
    )
    equalization: Switch | None = option(
        default=None,
        doc="Scale channels for the least rounding noise, and mix those of linear bottlenecks "
        "(:mod:`cat_plugin.ptq.transforms.equalization`); None for models with depthwise convolutions and less than 8 bits.",
        since="0.1",
    )
    smoothing: Annotated[str, OneOf(("smoothquant", *TRAINED, "repq", "searched"))] | None = option(
        default=None,
        doc="Scale and shift the channels of transformers between norms and linear layers, exactly, before quantizing "
        "(:mod:`cat_plugin.ptq.transforms.smoothing`); the names are those of the methods.",
        since="0.2",
    )
    smoothing_strength: Share = option(
        default=0.5,
        doc="Share of an activation's range that ``smoothquant`` and ``omniquant`` move into the weights.",
        since="0.2",
    )
    smoothing_epochs: Steps | None = option(
        default=None,
        doc="Passes over the calibration inputs for each block, in which ``omniquant``, ``lrquant`` and their like train scales, shifts and "
        "matrices "
        "(:mod:`cat_plugin.ptq.transforms.smoothing.training`); None as the preset says.",
        since="0.2",
    )
    rotation_vectors: Annotated[int, Field(strict=True, ge=1, le=64)] = option(
        default=1,
        doc="Rank of LRQuant+'s rotation vectors, trained where ``smoothing_epochs`` are, by whose product the dequantized weights "
        "of linear layers are multiplied (:mod:`cat_plugin.ptq.transforms.smoothing.vectors`); 1 is what scales are already.",
        since="0.3",
    )
    rotation: Annotated[str, OneOf(("folded", "online"))] | None = option(
        default=None,
        doc="""
        Rotate residual streams in front of norms, and the heads of attention, by Hadamard matrices that are folded into the
        weights (:mod:`cat_plugin.ptq.transforms.rotation.rotation`); ``online`` also what enters the last layer of a feed-forward
        network, at the cost of two small products at run time.
        """,
        since="0.3",
    )
    rounding: Annotated[str, OneOf(("straight_through", "adaround", "none"))] | None = option(
        default=None,
        doc="How the rounding is learned (:mod:`cat_plugin.ptq.learned.rounding`); None is ``adaround`` for units with weights of "
        "3 bits or less, else ``straight_through``.",
        since="0.1",
    )
    learned_steps: Switch = option(
        default=True,
        doc="Learn activation steps with the rounding (:mod:`cat_plugin.ptq.learned.steps`).",
        since="0.1",
    )
    drop_probability: Share = option(
        default=0.0,
        doc="QDrop's share of unquantized elements while units are trained (:mod:`cat_plugin.ptq.learned.steps`).",
        since="0.1",
    )
    input_mix: Share = option(
        default=0.0,
        doc="""
        Share of full-precision elements in a unit's input while it is trained.  QDrop mixes half; here the closed form has
        fitted the unit to quantized inputs already.  One unit was measured: of the output of ResNet-20's ``layer3.1`` at
        W2A2, strict, 0.397 was lost after 240 steps with half mixed in and 0.390 with none.
        """,
        since="0.1",
    )
    unit: Annotated[str, OneOf(("layer", "block", "pack"))] = option(
        default="block",
        doc="What is reconstructed at a time (:mod:`cat_plugin.ptq.graph.units`, :mod:`cat_plugin.ptq.graph.packs`).",
        since="0.1",
    )
    units: tuple[Pattern, ...] = option(
        default=(), doc="Name patterns of modules that are to be one unit each.", since="0.1"
    )
    unit_steps: Steps | None = option(
        default=None, doc="Gradient steps for each unit; None as the preset says.", since="0.1"
    )
    loss: Annotated[str, OneOf(("mse", "fisher", "curvature", "fima"))] = option(
        default="mse",
        doc="Loss of the reconstruction (:mod:`cat_plugin.ptq.learned.losses`): errors as they are, or weighted by squared "
        "gradients of the likeliest class or by the curvature of the divergence; ``fima`` adds its curvature along a few directions.",
        since="0.1",
    )
    guidance: _Weight = option(
        default=0.0, doc="Weight of the prediction difference (PD-Quant) in a unit's loss.", since="0.1"
    )
    model_steps: Steps | None = option(
        default=None,
        doc="Gradient steps of the whole-model stage (:mod:`cat_plugin.ptq.learned.logit_training`); None as the preset says.",
        since="0.1",
    )
    augment: Switch | None = option(
        default=None,
        doc="Varied inputs (:mod:`cat_plugin.ptq.learned.augment`) in that stage and the refinement; None for what looks like "
        "images.",
        since="0.1",
    )
    refinement_steps: Steps | None = option(
        default=None,
        doc="Gradient steps of CAT's refinement (:mod:`cat_plugin.ptq.learned.refinement`); None as the preset says.",
        since="0.1",
    )
    refinement_penalty: _Weight = option(default=0.01, doc="The refinement's ``lambda_p``.", since="0.1")
    temperature: Annotated[Number, Field(ge=1e-3, le=1e3)] = option(
        default=2.0,
        doc="``T`` of the divergence, in the whole-model stage and in the refinement.",
        since="0.1",
    )
    weight_budget: Annotated[Number, Field(ge=2, le=8)] | None = option(
        default=None,
        doc="Mean bits of a weight that ``w_bits`` is replaced by, chosen for each unit "
        "(:mod:`cat_plugin.ptq.closed_form.mixed_precision`).",
        since="0.1",
    )
    weight_candidates: Annotated[tuple[Bits, ...], Field(min_length=1)] = option(
        default=(2, 3, 4, 6, 8), doc="Bit-widths that ``weight_budget`` chooses from.", since="0.1"
    )
    memory_mb: Steps | None = option(
        default=None,
        doc="What activations may take, in MiB; those that are kept beyond it lie in files mapped into memory.",
        since="0.1",
    )
    bf16: Switch | None = option(
        default=None,
        doc="BF16 convolutions and linear layers in training passes (:mod:`cat_plugin.ptq.learned.precision`); None where the processor has it.",
        since="0.1",
    )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantSpec:
        """Make a spec from a mapping; an unknown key is an error that names the nearest known one."""
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain, JSON-able values."""
        out = {name: getattr(self, name) for name in options_of(QuantSpec)}
        out["overrides"] = {name: dataclasses.asdict(each) for name, each in self.overrides.items()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in out.items()}

    @property
    def grid_of_softmax(self) -> str:
        """``softmax_grid``, or what it is where it is None."""
        few = self.attention_bits is not None and self.attention_bits < 8
        return self.softmax_grid or ("fitted" if few else "uniform")

    @property
    def bits_before_depthwise(self) -> int:
        """``depthwise_bits``, or what it is where it is None."""
        return self.a_bits if self.depthwise_bits is None else self.depthwise_bits

    def layer_bits(self, name: str, *, first: bool, last: bool, depthwise: bool) -> tuple[int, int] | None:
        """Weight and input bits of the layer called ``name``, or None when it stays in float."""
        w_bits, a_bits = self.w_bits, self.bits_before_depthwise if depthwise else self.a_bits
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

    def check_patterns(self, layers: Iterable[str]) -> None:
        """Refuse a pattern in ``skip`` or ``overrides`` that matches no layer: it is misspelt, and does nothing.

        Parameters
        ----------
        layers : iterable of str
            The names of all layers.

        Raises
        ------
        CATValueError
            Naming the nearest layer.
        """
        names = list(layers)
        for where, patterns in (("skip", self.skip), ("overrides", self.overrides)):
            for pattern in patterns:
                if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                    raise CATValueError(
                        f"{where} has the pattern {pattern!r}, which matches no layer; {nearest(pattern, names)}"
                    )
