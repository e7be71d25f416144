"""Exact rewrites of the full-precision graph, each of which makes what is quantized afterwards easier to quantize."""

from __future__ import annotations

from collections.abc import Iterable

from cat_plugin.ptq.closed_form.sequence import generator_for
from cat_plugin.ptq.spec import QuantSpec
from cat_plugin.ptq.stages.stage import Stage, Step
from cat_plugin.ptq.state import State
from cat_plugin.ptq.transforms.attention import AttentionHeads
from cat_plugin.ptq.transforms.equalization import Equalization
from cat_plugin.ptq.transforms.rotation.rotation import InnerRotation, Rotation
from cat_plugin.ptq.transforms.smoothing.smoothing import Smoothing
from cat_plugin.ptq.transforms.transform import Transform

__all__ = ["TRANSFORMS", "EquivalentTransforms"]

#: In the order in which they are applied.
TRANSFORMS: tuple[Transform, ...] = (
    Equalization(),
    Rotation(),
    Smoothing(),
    InnerRotation(),
    AttentionHeads(),
)


class EquivalentTransforms(Stage):
    """Every transformation that the specification, or by default the graph, asks for."""

    name = "transforms"
    checkpointed = False
    keeps_values = False

    def __init__(self, transforms: tuple[Transform, ...] = TRANSFORMS) -> None:
        self.transforms = transforms

    def applies(self, spec: QuantSpec) -> bool:
        return True

    def exact(self, state: State) -> bool:
        return not state.unfinished

    def run(self, state: State) -> Iterable[Step]:
        for transform in self.transforms:
            if transform.applies(state.module, state.spec):
                generator = generator_for(state.spec.seed, transform.name)
                finish = transform.fold(state.module, state.inputs, state.spec, generator)
                if finish is not None:
                    state.unfinished.append(finish)
        return ()
