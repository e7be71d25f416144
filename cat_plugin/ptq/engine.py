"""``quantize``: from an eager model and calibration inputs to an explicit QDQ module and a report."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from cat_plugin.errors import CalibrationError, CATTypeError
from cat_plugin.ptq.cache import TensorStore
from cat_plugin.ptq.calibration import gather_inputs
from cat_plugin.ptq.checkpoint import Checkpoint, fingerprint
from cat_plugin.ptq.closed_form.sequence import generator_for
from cat_plugin.ptq.graph.fold import fold_batch_norm
from cat_plugin.ptq.graph.insert import Prepared, insert_quantizers
from cat_plugin.ptq.graph.lower import lower
from cat_plugin.ptq.graph.ops import BATCH_NORM, is_call, layer_name
from cat_plugin.ptq.graph.trace import eval_mode, trace
from cat_plugin.ptq.pipeline import run_stages
from cat_plugin.ptq.progress import Progress
from cat_plugin.ptq.report import QuantReport
from cat_plugin.ptq.spec import QuantSpec
from cat_plugin.ptq.transforms.equalization import equalize, has_depthwise, insert_ceilings

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
    if not isinstance(model, nn.Module):
        raise CATTypeError(f"the model is a {type(model).__name__}; expected a torch.nn.Module.")
    started = time.perf_counter()
    inputs = gather_inputs(calibration, spec.num_samples)
    parameter = next(model.parameters(), None)
    home = parameter.device if parameter is not None else inputs.device
    inputs = inputs.to(home)
    with contextlib.ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        stack.enter_context(torch.no_grad())
        _check_finite(model, inputs, spec.batch_size)
        module = trace(model, inputs[:2])
        fold_batch_norm(module)
        ceilings = {}
        if has_depthwise(module) if spec.equalization is None else spec.equalization:
            ceilings = equalize(module, inputs, spec, generator_for(spec.seed, "equalization"))
        prepared = insert_quantizers(module, spec)
        insert_ceilings(module, ceilings)
        checkpoint = None
        if resume is not None:
            checkpoint = Checkpoint(Path(resume), fingerprint(model, spec.to_dict(), inputs))
            stack.callback(checkpoint.close)
        target = torch.device(device) if device is not None else home
        module.to(target)
        budget = None if spec.memory_mb is None else spec.memory_mb << 20
        store = stack.enter_context(TensorStore(budget))
        layers, units, notes = run_stages(prepared, inputs.to(target), spec, store, progress, checkpoint)
        result = lower(module).to(home)
    report = QuantReport(
        layers=layers,
        units=units,
        unquantized=_unquantized(prepared),
        spec=spec.to_dict(),
        num_samples=len(inputs),
        seconds=time.perf_counter() - started,
        notes=notes,
        cache=dataclasses.asdict(_cache_use(store)),
    )
    if len(inputs) < spec.num_samples:
        report.notes.append(
            f"{spec.num_samples} calibration inputs were asked for, the calibration set holds {len(inputs)}"
        )
    for note in report.notes:
        _log.warning("%s", note)
    return result, report


@dataclasses.dataclass(frozen=True)
class _CacheUse:
    peak_bytes: int
    file_bytes: int


def _cache_use(store: TensorStore) -> _CacheUse:
    return _CacheUse(store.peak, store.on_disk)


def _unquantized(prepared: Prepared) -> list[str]:
    norms = [n for n in prepared.module.graph.nodes if is_call(n, BATCH_NORM)]
    return prepared.unquantized + [
        f"{layer_name(n)} (batch_norm): no convolution or linear layer to fold it into" for n in norms
    ]


def _check_finite(model: nn.Module, inputs: Tensor, batch_size: int) -> None:
    for start in range(0, len(inputs), batch_size):
        logits = model(inputs[start : start + batch_size])
        if isinstance(logits, Tensor) and not bool(torch.isfinite(logits).all()):
            raise CalibrationError(
                f"the full-precision model gives NaN or infinite logits on calibration batch "
                f"{start // batch_size} (inputs {start}..{min(start + batch_size, len(inputs)) - 1}); "
                "repair the model or remove these inputs."
            )
