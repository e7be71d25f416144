"""From the user's model to a graph with quantizers, and from there to the QDQ graph that is handed over."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from cat_plugin.batches import ModelCall
from cat_plugin.equivalence import Equivalence
from cat_plugin.errors import CalibrationError
from cat_plugin.models import run_call
from cat_plugin.ptq.graph.fold import fold_batch_norm
from cat_plugin.ptq.graph.insert import insert_quantizers
from cat_plugin.ptq.graph.lower import lower
from cat_plugin.ptq.graph.trace import trace
from cat_plugin.ptq.spec import QuantSpec
from cat_plugin.ptq.stages.stage import Stage, Step
from cat_plugin.ptq.state import State

__all__ = ["FoldBatchNorm", "InsertQuantizers", "Lower", "Trace"]


class _Always(Stage):
    checkpointed = False

    def applies(self, spec: QuantSpec) -> bool:
        return True


class _Exact(_Always):
    def exact(self, state: State) -> bool:
        return True


class Trace(_Exact):
    """The model as an ATen graph, once it is known to give finite logits."""

    name = "trace"

    def run(self, state: State) -> Iterable[Step]:
        inputs, rows = state.inputs, state.spec.batch_size
        for index, start in enumerate(range(0, len(inputs), rows)):
            batch = inputs[start : start + rows]
            name = f"calibration inputs from row {start} on"
            # A copy, since the inputs are the caller's and the model may work in place.
            logits = run_call(state.model, ModelCall((batch,)).copied(), name, "full-precision")
            if isinstance(logits, Tensor) and not bool(torch.isfinite(logits).all()):
                raise CalibrationError(
                    f"the full-precision model gives NaN or infinite logits on calibration batch {index} "
                    f"(inputs {start}..{start + len(batch) - 1}); repair the model or remove these "
                    "inputs."
                )
        state.equivalence = Equivalence(state.model, inputs)
        state.module = trace(state.model, inputs[:2])
        return ()


class FoldBatchNorm(_Exact):
    """BatchNorm as part of the layer in front of it."""

    name = "fold"

    def run(self, state: State) -> Iterable[Step]:
        fold_batch_norm(state.module)
        return ()


class InsertQuantizers(_Exact):
    """Layers with integers to be chosen, activation quantizers with ranges to be chosen."""

    name = "insert"

    def run(self, state: State) -> Iterable[Step]:
        state.prepared = insert_quantizers(state.module, state.spec)
        for finish in state.unfinished:
            finish(state.module)
        state.module.to(state.device)
        state.inputs = state.inputs.to(state.device)
        return ()


class Lower(_Always):
    """Explicit quantize and dequantize operations on integer weights."""

    name = "lower"

    def run(self, state: State) -> Iterable[Step]:
        quantized = Equivalence(state.module, state.inputs)
        state.module = lower(state.module)
        quantized.check(self.name, state.module)
        state.module.to(state.home)
        return ()
