"""What the stages of a quantization work on and hand on to each other."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from cat_plugin.equivalence import Equivalence
from cat_plugin.ptq.cache import TensorStore
from cat_plugin.ptq.graph.insert import Prepared
from cat_plugin.ptq.graph.units import Unit, find_units, whole_model
from cat_plugin.ptq.learned.augment import looks_like_images
from cat_plugin.ptq.learned.precision import bf16_is_faster
from cat_plugin.ptq.learned.quality import Quality
from cat_plugin.ptq.presets import Plan, plan
from cat_plugin.ptq.progress import Reporter
from cat_plugin.ptq.report import LayerReport, QuantReport, UnitReport
from cat_plugin.ptq.rows import Inputs, Rows
from cat_plugin.ptq.spec import QuantSpec

__all__ = ["State"]


@dataclass
class State:
    """One run: what was asked for, the graph as it stands, and what is known of it so far.

    Attributes
    ----------
    model : nn.Module
        The user's, in evaluation mode; only read.
    spec : QuantSpec
        What was asked for.
    inputs : Inputs
        (N, ...) calibration inputs; on the model's device up to the insertion of quantizers, on ``device`` behind it.
    device, home : torch.device
        Where to compute, and where the model is and the result goes.
    store : TensorStore
        Where activations are cached.
    reporter : Reporter
        Receives the work done inside a step (:meth:`~cat_plugin.ptq.progress.Reporter.advance`).
    module : fx.GraphModule
        The graph, rewritten in place; from the first stage on.
    equivalence : Equivalence
        The user's model on a few rows, for comparison; from the first stage on.
    unfinished : list of callable
        What equivalent transformations have left to do, in place, in the graph with quantizers.
    prepared : Prepared
        The same graph with its quantized layers; from the insertion of quantizers on.
    quality : Quality
        What counts of the results, and as what; from the first stage on.
    logits : Rows
        (N, C) of full precision, or what else counts of its results; from the fit of the units on, where anything is trained.
    packs : list of tuple of int
        Ranges of units that are trained together, if units are packs.
    layers : list of LayerReport
        Reports of the layers fitted, in order.
    units : list of UnitReport
        Reports of what was trained, in order.
    notes : list of str
        What else the user should know.
    finished : list of str
        Keys of the steps that the checkpoint holds.
    kept : dict of str to Tensor
        What an interrupted run has left of them, until it is put back.
    """

    model: nn.Module
    spec: QuantSpec
    inputs: Inputs
    device: torch.device
    home: torch.device
    store: TensorStore
    reporter: Reporter
    module: fx.GraphModule = field(init=False)
    equivalence: Equivalence = field(init=False)
    unfinished: list[Callable[[fx.GraphModule], None]] = field(default_factory=list)
    prepared: Prepared = field(init=False)
    quality: Quality = field(init=False)
    logits: Rows = field(init=False)
    packs: list[tuple[int, int]] = field(default_factory=list)
    layers: list[LayerReport] = field(default_factory=list)
    units: list[UnitReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    kept: dict[str, Tensor] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        """Gradient steps of each stage."""
        return plan(self.spec)

    @property
    def layer_count(self) -> int:
        """Quantized layers of the graph; 0 as long as it has no quantizers."""
        return len(self.prepared.layers) if hasattr(self, "prepared") else 0

    @property
    def bf16(self) -> bool:
        """Whether training passes compute dense layers in BF16."""
        return bf16_is_faster(self.inputs.device) if self.spec.bf16 is None else self.spec.bf16

    @property
    def augment(self) -> bool:
        """Whether training on the logits varies its inputs."""
        images = len(self.inputs.tensors) == 1 and looks_like_images(self.inputs.tensors[0])
        return images if self.spec.augment is None else self.spec.augment

    def kept_of(self, key: str) -> list[Tensor] | None:
        """What a finished step has kept for a resumed run, in order; None if an earlier run has not done it."""
        if key not in self.finished:
            return None
        numbers = itertools.count()
        names = itertools.takewhile(self.kept.__contains__, (f"{key}/{number}" for number in numbers))
        return [self.kept[name] for name in names]

    def whole(self) -> Unit:
        """The graph as one unit, with what counts of its results."""
        return whole_model(self.module, self.quality.nodes(self.module.graph))

    def blocks(self) -> list[Unit]:
        """The graph's units as the specification wants them, packs not yet joined."""
        return find_units(self.module, self.spec.units, "layer" if self.spec.unit == "layer" else "block")

    def report(self, seconds: float) -> QuantReport:
        """What was done, once the run is over."""
        count = self.inputs.ranks.extent(len(self.inputs)).total
        report = QuantReport(
            layers=self.layers,
            units=self.units,
            unquantized=self.prepared.unquantized,
            spec=self.spec.to_dict(),
            num_samples=count,
            seconds=seconds,
            cache={"peak_bytes": self.store.peak, "file_bytes": self.store.on_disk},
            notes=self.notes,
        )
        if count < self.spec.num_samples:
            report.notes.append(
                f"{self.spec.num_samples} calibration inputs were asked for, the calibration set holds "
                f"{count}"
            )
        return report
