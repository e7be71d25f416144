"""Calls run through a model, and what comes back checked and gathered as logits.

The calls themselves are read by :mod:`cat_plugin.batches`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from cat_plugin.batches import ModelCall, as_calls
from cat_plugin.errors import CalibrationError, no_calibration_batch
from cat_plugin.models import evaluating, run_call

__all__ = [
    "Advancing",
    "ModelCall",
    "as_calls",
    "check_logits",
    "collect_logits",
    "evaluating",
    "logits_array",
]


class Advancing(Protocol):
    """Something that counts work as it is done, such as a progress bar."""

    def update(self, steps: int, /) -> None:
        """Advance by `steps`."""


def check_logits(output: Any, batch: int, role: str, n_classes: int | None = None) -> torch.Tensor:
    """The output of a model as logits, or an error that names the batch.

    Parameters
    ----------
    output : object
        What the model returned.
    batch : int
        Number of the batch, from 0, for the message.
    role : str
        Which model it was, for the message.
    n_classes : int, optional
        The number of columns that earlier batches had.

    Returns
    -------
    torch.Tensor
        Shape (N, C), floating point, finite, detached.

    Raises
    ------
    CalibrationError
        When it is not a tensor, not (N, C), of another C than before, not floating point, or not finite.
    """
    if not isinstance(output, torch.Tensor):
        raise CalibrationError(
            f"the {role} model returned a {type(output).__name__} for calibration batch {batch}; the cluster-affine "
            "step works on logits, one tensor of shape (N, C). Wrap the model so that it returns them."
        )
    if output.ndim != 2 or not output.is_floating_point():
        raise CalibrationError(
            f"the {role} model returned a {output.dtype} tensor of shape {tuple(output.shape)} for calibration batch "
            f"{batch}; expected floating-point logits of shape (N, C). Wrap the model so that it returns them."
        )
    if n_classes is not None and output.shape[1] != n_classes:
        raise CalibrationError(
            f"the {role} model returned {output.shape[1]} columns for calibration batch {batch} and {n_classes} for "
            "the batches before; the number of classes must not change"
        )
    logits = output.detach()
    finite = torch.isfinite(logits)
    if not bool(finite.all()):
        rows = torch.nonzero(~finite.all(dim=1)).flatten().tolist()
        raise CalibrationError(
            f"the {role} model returned NaN or infinite logits for calibration batch {batch}, in {len(rows)} of "
            f"{len(logits)} rows (the first is row {rows[0]}); check that batch for broken inputs, or the "
            "quantization for an overflow"
        )
    return logits


def logits_array(output: Any, batch: int, role: str, n_classes: int | None = None) -> np.ndarray:
    """The output of a model as an array of its own of shape (N, C), float32 or float64; see :func:`check_logits`."""
    logits = check_logits(output, batch, role, n_classes)
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    return np.array(logits.cpu().numpy())


def collect_logits(
    model: nn.Module, calls: Iterable[ModelCall], role: str, progress: Advancing | None = None
) -> np.ndarray:
    """Run a model over calibration calls and gather its logits.

    Parameters
    ----------
    model : torch.nn.Module
        Run in evaluation mode, without gradients, on the device that its parameters are on.
    calls : iterable of ModelCall
        The inputs.
    role : str
        ``"full-precision"`` or ``"quantized"``, for messages.
    progress : Advancing, optional
        Advanced by one after every batch.

    Returns
    -------
    numpy.ndarray
        Shape (N, C), float32 (float64 where the model computes in it).

    Raises
    ------
    CalibrationError
        When there is no batch, the model fails on one, or returns what :func:`check_logits` refuses.
    """
    parts: list[np.ndarray] = []
    with torch.no_grad(), evaluating(model):
        for number, call in enumerate(calls):
            output = run_call(model, call, f"calibration batch {number}", role)
            parts.append(logits_array(output, number, role, parts[0].shape[1] if parts else None))
            if progress is not None:
                progress.update(1)
    if not sum(len(part) for part in parts):
        raise no_calibration_batch()
    return np.concatenate(parts)
