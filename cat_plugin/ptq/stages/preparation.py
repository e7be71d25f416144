"""From the user's model to a graph with quantizers, and from there to the QDQ graph that is handed over."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from cat_plugin.equivalence import Equivalence
from cat_plugin.errors import CalibrationError
from cat_plugin.models import run_call
from cat_plugin.ptq.graph.fold import fold_batch_norm, fold_factors
from cat_plugin.ptq.graph.insert import insert_quantizers
from cat_plugin.ptq.graph.lengths import follow_length, token_axis
from cat_plugin.ptq.graph.lockstep import check_lowered
from cat_plugin.ptq.graph.lower import lower
from cat_plugin.ptq.graph.trace import refuse_random, trace
from cat_plugin.ptq.learned.quality import Quality
from cat_plugin.ptq.memory import rows_of_the_model
from cat_plugin.ptq.quantizers.uniform import ActQuantizer
from cat_plugin.ptq.spec import QuantSpec
from cat_plugin.ptq.stages.stage import Stage, Step
from cat_plugin.ptq.state import State
from cat_plugin.structures import leaves_of

__all__ = ["AnyLength", "FoldBatchNorm", "InsertQuantizers", "Lower", "Trace"]

_log = logging.getLogger("cat_plugin")

_SEEN = 256  # rows of an input that are looked at
_FAR = 8.0  # deviations that a mean lies from zero, of which a grid that holds zero leaves little
_FEW = 2  # rows that are run before it is known how much memory one takes


class _Always(Stage):
    checkpointed = False

    def applies(self, spec: QuantSpec) -> bool:
        return True


class _Exact(_Always):
    def exact(self, state: State) -> bool:
        return True


def _check(state: State, start: int, stop: int, rows: int) -> None:
    """Run the model over some of the inputs, so many rows at a time: it must give finite numbers."""
    for first in range(start, min(stop, len(state.inputs)), rows):
        batch = state.inputs[first : first + rows]
        # A copy, since the inputs are the caller's and the model may work in place.
        name = f"calibration inputs from row {first} on"
        result = run_call(state.model, batch.call.copied(), name, "full-precision")
        real = [leaf for leaf in leaves_of(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if not all(bool(torch.isfinite(leaf).all()) for leaf in real):
            what = "logits" if isinstance(result, Tensor) else "values"
            raise CalibrationError(
                f"the full-precision model gives NaN or infinite {what} on calibration batch "
                f"{first // state.spec.batch_size} (inputs {first}..{first + len(batch) - 1}); repair the model or remove "
                "these inputs."
            )


class Trace(_Exact):
    """The model as an ATen graph, once it is known to give finite logits."""

    name = "trace"

    def run(self, state: State) -> Iterable[Step]:
        inputs, spec, budget = state.inputs, state.spec, state.store.budget
        # The model's own errors on its inputs come before those of tracing it; how much a row takes is known behind it.
        first = spec.batch_size if budget is None else _FEW
        _check(state, 0, first, first)
        state.module = trace(state.model, inputs[:2])
        rows = rows_of_the_model(state.module.graph, spec.batch_size, budget)
        _check(state, first, len(inputs), rows)
        state.equivalence = Equivalence(state.model, inputs.call)
        refuse_random(state.module)
        if not state.equivalence.rows_are_independent:
            state.notes.append(
                "what the model gives for an input depends on the others in its batch, or is one value for all: ranges are "
                f"those of batches of {rows}, and values of a batch of another size may lie outside of them"
            )
        state.quality = Quality.of(state.module.graph, spec.outputs, spec.logits, spec.class_axis)
        return ()


class AnyLength(_Always):
    """Where the model reads token numbers: what of the graph follows the length of the sequences."""

    name = "lengths"

    def run(self, state: State) -> Iterable[Step]:
        if token_axis(state.inputs) is not None:
            reason = follow_length(
                state.module, state.model, state.inputs[:2], lambda inputs: trace(state.model, inputs)
            )
            if reason is not None:
                _log.info("the result takes sequences of one length: %s", reason)
        return ()


class FoldBatchNorm(_Exact):
    """BatchNorm, and a factor for each channel, as part of the layer in front of it."""

    name = "fold"

    def run(self, state: State) -> Iterable[Step]:
        fold_batch_norm(state.module)
        fold_factors(state.module)
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
        if state.inputs.ranks.size == 1:
            state.notes += _far_from_zero(state)
        return ()


def _far_from_zero(state: State) -> list[str]:
    """Inputs that layers read as they are and whose grid, which holds zero, has few levels where their values lie."""
    notes = []
    given = [node for node in state.module.graph.nodes if node.op == "placeholder"]
    for node, x in zip(given, state.inputs.tensors, strict=False):
        readers = [
            child
            for user in node.users
            if user.op == "call_module"
            and isinstance(child := state.module.get_submodule(str(user.target)), ActQuantizer)
        ]
        some = x[:_SEEN]
        if not readers or not some.is_floating_point() or some.numel() < 2:
            continue
        centre, spread = float(some.mean()), float(some.std())
        if abs(centre) > _FAR * spread:
            levels = 4 * spread * 2 ** readers[0].bits / float(some.abs().max())
            notes.append(
                f"the input {node.name} lies around {centre:.3g} and spreads by {spread:.2g}: {readers[0].bits} bits from zero on have "
                f"{levels:.1f} levels there; subtract its mean in the model, in front of the first layer"
            )
    return notes


class Lower(_Always):
    """Explicit quantize and dequantize operations on integer weights."""

    name = "lower"

    def run(self, state: State) -> Iterable[Step]:
        prepared = state.module
        state.module, counterparts = lower(prepared)
        check_lowered(prepared, state.module, counterparts, state.inputs[:2].tensors)
        state.module.to(state.home)
        return ()
