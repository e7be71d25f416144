"""Scales and shifts of channels trained on top of those in closed form."""

from __future__ import annotations

from collections.abc import Iterator

from cat_plugin.ptq.closed_form.sequence import generator_for
from cat_plugin.ptq.graph.ops import output_leaves
from cat_plugin.ptq.presets import plan
from cat_plugin.ptq.spec import QuantSpec
from cat_plugin.ptq.stages.stage import Stage, Step
from cat_plugin.ptq.state import State
from cat_plugin.ptq.transforms.smoothing.blocks import find_blocks
from cat_plugin.ptq.transforms.smoothing.places import find_places
from cat_plugin.ptq.transforms.smoothing.training import Streams, train_block, widths_of

__all__ = ["TrainedSmoothing"]


class TrainedSmoothing(Stage):
    """Block by block, each on what the blocks before it give when they are quantized."""

    name = "smoothing"
    checkpointed = False
    keeps_values = False

    def applies(self, spec: QuantSpec) -> bool:
        return plan(spec).smoothing_epochs > 0

    def exact(self, state: State) -> bool:
        return not state.unfinished

    def run(self, state: State) -> Iterator[Step]:
        module, spec = state.module, state.spec
        if len(state.inputs.tensors) > 1 or len(output_leaves(module.graph)) > 1:
            note = (
                "smoothing: closed form only, blocks are trained where a model has one input and one result"
            )
            yield Step(self.name, self.name, notes=(note,), saved=False)
            return
        (inputs,) = state.inputs.tensors
        streams = Streams(inputs, inputs)
        widths = widths_of(module, spec)
        for block in find_blocks(module, find_places(module)):
            generator = generator_for(spec.seed, f"smoothing {block.name}")
            epochs = state.plan.smoothing_epochs
            outcome = train_block(module, block, streams, spec, epochs, generator, widths)
            if outcome is not None:
                yield Step(block.name, self.name, outcome, saved=False)
