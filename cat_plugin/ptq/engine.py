"""``quantize``: from an eager model and calibration inputs to an explicit QDQ module and a report."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from cat_plugin.errors import CATTypeError
from cat_plugin.models import device_of, evaluating, fingerprint
from cat_plugin.ptq.cache import TensorStore
from cat_plugin.ptq.calibration import gather_inputs
from cat_plugin.ptq.checkpoint import Checkpoint
from cat_plugin.ptq.graph.accept import acceptable
from cat_plugin.ptq.pipeline import run_stages
from cat_plugin.ptq.progress import Progress, Reporter
from cat_plugin.ptq.report import QuantReport
from cat_plugin.ptq.spec import QuantSpec
from cat_plugin.ptq.state import State

__all__ = ["quantize"]

_log = logging.getLogger("cat_plugin")


def quantize(
    model: nn.Module,
    spec: QuantSpec,
    calibration: Iterable[Any] | Tensor,
    *,
    progress: Callable[[Progress], None] | None = None,
    device: str | torch.device | None = None,
    resume: str | Path | None = None,
) -> tuple[fx.GraphModule, QuantReport]:
    """Quantize a trained classifier to 2..8 bits from unlabelled inputs.

    Parameters
    ----------
    model : nn.Module
        Takes one batch (N, ...), returns one tensor (N, C); left unchanged.
    spec : QuantSpec
        What to quantize and how.
    calibration : iterable
        Input batches (a tensor, or a tuple whose first item is the input).
    progress : callable or None
        Called with a :class:`~cat_plugin.ptq.progress.Progress` now and then, and after every unit.
    device : str, torch.device or None
        Where to compute; None is where the model is.  The result is on the model's device.
    resume : path or None
        Directory for the state after each unit; an interrupted run that is started again with the same arguments goes
        on from there and gives the same result.

    Returns
    -------
    module : fx.GraphModule
        In evaluation mode, computing with explicit ``quantized_decomposed`` operations on integer weights.
    report : QuantReport
        What was done, layer by layer.

    Raises
    ------
    CalibrationError
        If the calibration inputs, or what the model makes of them, cannot be used.
    QuantizationError
        If the model cannot be traced or has nothing to quantize, or the checkpoint is another run's.
    """
    if not isinstance(spec, QuantSpec):
        raise CATTypeError(f"spec is a {type(spec).__name__}; expected a QuantSpec.")
    started = time.perf_counter()
    model, notes = acceptable(model)
    inputs = gather_inputs(calibration, spec.num_samples)
    if inputs.is_floating_point():
        inputs = inputs.float()
    home = device_of(model) or inputs.device
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model, warn=True))
        stack.enter_context(torch.no_grad())
        store = stack.enter_context(TensorStore(None if spec.memory_mb is None else spec.memory_mb << 20))
        checkpoint = None
        if resume is not None:
            checkpoint = Checkpoint(
                Path(resume), fingerprint(model, spec.to_dict(), inputs, torch.__version__)
            )
            stack.callback(checkpoint.close)
        state = State(
            model=model,
            spec=spec,
            inputs=inputs.to(home),
            device=torch.device(device) if device is not None else home,
            home=home,
            store=store,
            reporter=Reporter(progress),
            notes=notes,
        )
        run_stages(state, checkpoint)
    report = state.report(time.perf_counter() - started)
    for note in report.notes:
        _log.warning("%s", note)
    return state.module, report
