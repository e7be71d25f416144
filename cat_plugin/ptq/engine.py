"""``quantize``: from an eager model and calibration inputs to an explicit QDQ module and a report."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from cat_plugin.errors import CalibrationError, CATTypeError
from cat_plugin.heap import freed_memory_kept
from cat_plugin.models import device_of, evaluating, fingerprint, full_float32
from cat_plugin.ptq.agreement import check_agreement, refuse_training, report_of_first
from cat_plugin.ptq.cache import TensorStore
from cat_plugin.ptq.calibration import gather_inputs
from cat_plugin.ptq.checkpoint import Checkpoint, code_of_engine
from cat_plugin.ptq.graph.accept import acceptable
from cat_plugin.ptq.pipeline import run_stages
from cat_plugin.ptq.progress import Progress, Reporter
from cat_plugin.ptq.ranks import Ranks, share_of
from cat_plugin.ptq.report import QuantReport
from cat_plugin.ptq.spec import QuantSpec
from cat_plugin.ptq.state import State
from cat_plugin.ptq.synthetic import has_statistics, synthetic_inputs

__all__ = ["quantize"]

_log = logging.getLogger("cat_plugin")

_SYNTHETIC = 256  # inputs that are made where none are given


def quantize(
    model: nn.Module,
    spec: QuantSpec,
    calibration: Iterable[Any] | Tensor | None,
    *,
    progress: Callable[[Progress], None] | None = None,
    device: str | torch.device | None = None,
    resume: str | Path | None = None,
    input_shape: Sequence[int] | None = None,
    distributed: bool = True,
) -> tuple[fx.GraphModule, QuantReport]:
    """Quantize a trained model to 2..8 bits from unlabelled inputs.

    Parameters
    ----------
    model : nn.Module
        Any whose calls the calibration batches are; left unchanged.  It may return one tensor, such as logits (N, C), or a
        tuple, list, dict or data class of tensors (``spec.outputs`` and ``spec.logits`` say what counts of them).
    spec : QuantSpec
        What to quantize and how.
    calibration : iterable or None
        Input batches: a tensor, a mapping of keyword arguments, or a tuple whose first item is the input, or a tuple or
        list of several inputs (:func:`cat_plugin.batches.read_batch`).  None makes them from what the model's
        BatchNorms remember (:func:`~cat_plugin.ptq.synthetic.synthetic_inputs`), which costs accuracy; ``input_shape`` says
        how large.  Where ``torch.distributed`` is initialised: this process's share, as a ``DistributedSampler`` gives it.
    progress : callable or None
        Called with a :class:`~cat_plugin.ptq.progress.Progress` now and then, and after every unit.
    device : str, torch.device or None
        Where to compute; None is where the model is.  The result is on the model's device.
    resume : path or None
        Directory for the state after each unit; an interrupted run that is started again with the same arguments goes
        on from there and gives the same result.
    input_shape : sequence of int or None
        Of one input, without the batch axis; for a quantization without calibration inputs.
    distributed : bool, default True
        Where the default group of ``torch.distributed`` is initialised: whether its processes quantize together.  All of them
        must call this function then, with the same model and specification, each with its share of the calibration inputs;
        all get the same result, and the first alone reports progress and writes to `resume`.

    Returns
    -------
    module : fx.GraphModule
        In evaluation mode, computing with explicit ``quantized_decomposed`` operations on integer weights.  It is called
        as the model is in the calibration, and returns what that does: the same keys, and the same class where
        ``torch.export`` knows it; else a dict of its fields.
    report : QuantReport
        What was done, layer by layer.

    Raises
    ------
    CalibrationError
        If the calibration inputs, or what the model makes of them, cannot be used.
    QuantizationError
        If the model cannot be traced or has nothing to quantize, or the checkpoint is another run's; of several processes, if
        one has failed, or the specification trains.
    """
    if not isinstance(spec, QuantSpec):
        raise CATTypeError(f"spec is a {type(spec).__name__}; expected a QuantSpec.")
    started = time.perf_counter()
    ranks = Ranks.here(distributed)
    with contextlib.ExitStack() as stack:
        # what is kept would count as taken; training keeps what its steps free (`descend`)
        if spec.memory_mb is None:
            stack.enter_context(freed_memory_kept())
        stack.enter_context(ranks.together())
        refuse_training(spec, ranks)
        model, notes = acceptable(model)
        share = share_of(spec.num_samples, spec.batch_size, ranks.rank, ranks.size)
        if calibration is None:
            calibration, note = _without_data(model, spec, input_shape)
            calibration = calibration[share_of(len(calibration), spec.batch_size, ranks.rank, ranks.size)]
            notes.append(note)
        store = stack.enter_context(TensorStore(None if spec.memory_mb is None else spec.memory_mb << 20))
        inputs = gather_inputs(
            calibration, share.stop - share.start, None if spec.memory_mb is None else store, ranks
        )
        inputs = inputs.mapped(lambda x: x.float() if x.is_floating_point() else x)
        home = device_of(model) or inputs.device
        stack.enter_context(evaluating(model, warn=True))
        stack.enter_context(torch.no_grad())
        stack.enter_context(full_float32())
        checkpoint = None
        key, more = check_agreement(ranks, model, spec, inputs) if resume or ranks.size > 1 else ("", [])
        if resume is not None and ranks.first:
            checkpoint = Checkpoint(
                Path(resume),
                fingerprint(model, spec.to_dict(), key, torch.__version__, code_of_engine()),
                {"spec": spec.to_dict(), "inputs": len(inputs)},
            )
            stack.callback(checkpoint.close)
        state = State(
            model=model,
            spec=spec,
            inputs=inputs.to(home),
            device=torch.device(device) if device is not None else home,
            home=home,
            store=store,
            reporter=Reporter(progress if ranks.first else None),
            notes=[*notes, *more],
        )
        run_stages(state, checkpoint)
        report = report_of_first(ranks, state.report(time.perf_counter() - started))
    for note in report.notes:
        _log.debug("%s", note)
    for line in report.summary() if ranks.first else ():
        _log.warning("%s", line)
    return state.module, report


def _without_data(model: nn.Module, spec: QuantSpec, shape: Sequence[int] | None) -> tuple[Tensor, str]:
    """Inputs made from the model, and what the caller should know of them."""
    if shape is None:
        raise CalibrationError(
            "there are no calibration inputs (calibration is None); expected input batches, or input_shape, such as "
            "(3, 224, 224), to have some made from what the model's BatchNorms remember."
        )
    if not (has_statistics(model) or spec.weight_only or spec.a_bits >= 8):
        raise CalibrationError(
            f"there are no calibration inputs, the model has no BatchNorm that remembers any, and a_bits is {spec.a_bits}: ranges of "
            "so few levels cannot be chosen on made-up inputs (nothing was left of a MobileNetV2 at 4 bits). Give a few dozen real "
            "inputs, or the model before its BatchNorms were folded, or take a_bits=8."
        )
    inputs = synthetic_inputs(model, shape, min(spec.num_samples, _SYNTHETIC), seed=spec.seed)
    return inputs, (
        f"no calibration inputs were given: {len(inputs)} were made from the model itself. A few dozen real ones are better "
        "at every bit-width, and at 4 bits by points"
    )
