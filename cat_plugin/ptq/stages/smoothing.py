"""Scales and shifts of channels trained on top of those in closed form."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

from cat_plugin.ptq.closed_form.sequence import LARGE_RESULTS, generator_for
from cat_plugin.ptq.graph.ops import output_leaves
from cat_plugin.ptq.presets import plan
from cat_plugin.ptq.spec import QuantSpec
from cat_plugin.ptq.stages.stage import Stage, Step
from cat_plugin.ptq.state import State
from cat_plugin.ptq.transforms.smoothing.blocks import Block, find_blocks
from cat_plugin.ptq.transforms.smoothing.places import find_places
from cat_plugin.ptq.transforms.smoothing.training import Streams, rows_of_a_step, train_block, widths_of

__all__ = ["TrainedSmoothing"]

_WORK = 1.5  # of a block's gradient step, in those of a layer


def _tick(state: State, name: str, step: int) -> None:
    state.reporter.advance(name, _WORK)


class TrainedSmoothing(Stage):
    """Block by block, each on what the blocks before it give when they are quantized."""

    name = "smoothing"
    checkpointed = False
    keeps_values = False

    def applies(self, spec: QuantSpec) -> bool:
        return plan(spec).smoothing_epochs > 0

    def exact(self, state: State) -> bool:
        return not state.unfinished

    def work(self, state: State) -> float:
        if not hasattr(state, "module"):
            return 0.0
        known = state.module.meta
        if "smoothed_blocks" not in known:  # asked for before every stage, and not quickly found
            known["smoothed_blocks"] = sum(1 for block in self._blocks(state) if block.places)
        return self._step_work(state) * int(known["smoothed_blocks"])

    @staticmethod
    def _blocks(state: State) -> list[Block]:
        """Those that are trained; not the one that makes a language model's logits, which would have to be kept."""
        blocks = find_blocks(state.module, find_places(state.module))
        row = math.prod(blocks[-1].output.meta["val"].shape[1:])
        return blocks[:-1] if row * len(state.inputs) > LARGE_RESULTS else blocks

    def _step_work(self, state: State) -> float:
        rows = rows_of_a_step(state.inputs.tensors[0])
        return _WORK * state.plan.smoothing_epochs * math.ceil(len(state.inputs) / rows)

    def run(self, state: State) -> Iterator[Step]:
        module, spec = state.module, state.spec
        if len(state.inputs.tensors) > 1 or len(output_leaves(module.graph)) > 1:
            note = (
                "smoothing: closed form only, blocks are trained where a model has one input and one result"
            )
            yield Step(self.name, self.name, notes=(note,), saved=False)
            return
        (inputs,) = state.inputs.tensors
        streams = Streams(inputs, inputs, state.store)
        widths = widths_of(module, spec)
        for block in self._blocks(state):
            generator = generator_for(spec.seed, f"smoothing {block.name}")
            epochs = state.plan.smoothing_epochs
            step = Step(block.name, self.name, work=self._step_work(state))
            kept = state.kept_of(step.key)
            tick = functools.partial(_tick, state, block.name)
            outcome, trained = train_block(
                module, block, streams, spec, epochs, generator, widths, kept, tick=tick
            )
            if kept is not None:
                yield dataclasses.replace(step, resumed=True)
            elif outcome is not None:
                yield dataclasses.replace(step, outcome=outcome, kept=trained)
