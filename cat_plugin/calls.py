"""Calls run through a model, and what comes back checked and gathered as rows of logits.

The calls themselves are read by :mod:`cat_plugin.batches`.  Which result is logits, :class:`cat_plugin.logits.LogitsOf` says;
those of pixels and tokens are sampled, the same ones of every model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from cat_plugin.batches import ModelCall, as_calls
from cat_plugin.errors import CalibrationError, no_calibration_batch
from cat_plugin.logits import LogitsOf, as_rows
from cat_plugin.models import evaluating, run_call
from cat_plugin.structures import leaves_of, names_of_results

__all__ = [
    "Advancing",
    "LogitRows",
    "ModelCall",
    "as_calls",
    "collect_logits",
    "evaluating",
    "is_classifier",
]

# Of pixels and tokens at most so many rows are kept, and at most so many bytes.
_ROWS = 2**16
_BYTES = 2**28


class Advancing(Protocol):
    """Something that counts work as it is done, such as a progress bar."""

    def update(self, steps: int, /) -> None:
        """Advance by `steps`."""


class LogitRows(NamedTuple):
    """Logits of one model over calibration calls, row by row.

    Attributes
    ----------
    values : ndarray of shape (R, C), float32 or float64
        One row for each sample, or several where the classes are those of pixels or tokens.
    samples : ndarray of shape (R,), int64
        The number of the sample that each row is of, in order.
    leaf : int
        Which leaf of the model's result they are.
    class_axis : int
        The axis of classes there, from 1 on.
    """

    values: np.ndarray
    samples: np.ndarray
    leaf: int = 0
    class_axis: int = 1


def is_classifier(output: Any) -> bool:
    """Whether what a model returned is one tensor (N, C) of real numbers, which is logits unless something else is said."""
    return isinstance(output, torch.Tensor) and output.ndim == 2 and output.is_floating_point()


def _logits(
    model: torch.nn.Module, output: Any, batch: int, role: str, wanted: LogitsOf
) -> tuple[torch.Tensor, int, int]:
    """The tensor of logits among a model's results, its place among the leaves and its axis of classes."""
    leaves, names = leaves_of(output), names_of_results(model, output)
    if not wanted.given and not is_classifier(output):
        given = type(output).__name__
        if isinstance(output, torch.Tensor):
            given = f"{output.dtype} tensor of shape {tuple(output.shape)}"
        raise CalibrationError(
            f"the {role} model returned a {given} for calibration batch {batch}; the cluster-affine step works on logits, one tensor of shape (N, C), "
            f"unless logits= names the output to correct, of {', '.join(names)}, and class_axis= its axis of classes"
        )
    leaf = wanted.find(names)
    usable = [
        name for name, each in zip(names, leaves, strict=True)
        if isinstance(each, torch.Tensor) and each.ndim > 1 and each.is_floating_point()
    ]  # fmt: skip
    if leaf is None or names[leaf] not in usable:
        named = (
            wanted if wanted.output is not None else LogitsOf(names[leaf] if leaf is not None else "logits")
        )
        raise CalibrationError(
            f"the {role} model's output cannot be corrected for calibration batch {batch}: {named.missing(usable)}"
        )
    axis = wanted.axis(leaves[leaf].ndim)
    if axis is None:
        raise CalibrationError(wanted.no_axis(names[leaf], leaves[leaf].ndim))
    return leaves[leaf].detach(), leaf, axis


def _check(logits: torch.Tensor, axis: int, batch: int, role: str, n_classes: int | None) -> None:
    if n_classes is not None and logits.shape[axis] != n_classes:
        raise CalibrationError(
            f"the {role} model returned {logits.shape[axis]} columns for calibration batch {batch} and {n_classes} for "
            "the batches before; the number of classes must not change"
        )
    finite = torch.isfinite(logits)
    if not bool(finite.all()):
        rows = torch.nonzero(~finite.flatten(1).all(dim=1)).flatten().tolist()
        raise CalibrationError(
            f"the {role} model returned NaN or infinite logits for calibration batch {batch}, in {len(rows)} of "
            f"{len(logits)} rows (the first is row {rows[0]}); check that batch for broken inputs, or the "
            "quantization for an overflow"
        )


def _sampled(
    logits: torch.Tensor, axis: int, most: int, generator: torch.Generator, attended: torch.Tensor | None
) -> tuple[torch.Tensor, np.ndarray]:
    """(R, C) rows of logits, at most `most` of each sample, drawn without replacement, and (N,) how many are of each."""
    rows = as_rows(logits, axis)
    places = len(rows) // max(1, len(logits))
    if places <= most and attended is None:
        return rows, np.full(len(logits), places)
    scores = torch.rand(len(logits), places, generator=generator)
    if attended is not None:
        scores.masked_fill_(~attended, -1.0)
    chosen = scores.topk(min(most, places), dim=1).indices.sort(dim=1).values
    kept = scores.gather(1, chosen) >= 0.0
    chosen += torch.arange(len(logits))[:, None] * places
    return rows[chosen[kept].to(rows.device)], kept.sum(1).numpy()


def _attended(call: ModelCall, logits: torch.Tensor, axis: int) -> torch.Tensor | None:
    """(N, T) which rows of the logits are of tokens and not of padding; None where the call says nothing of them.

    A sample that is all padding keeps its first token, so that every sample has a row.
    """
    mask = call.kwargs.get("attention_mask")
    tokens = [extent for number, extent in enumerate(logits.shape) if number != axis]
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or list(mask.shape) != tokens:
        return None
    attended = mask.cpu() != 0
    attended[:, 0] |= ~attended.any(1)
    return None if bool(attended.all()) else attended


def collect_logits(
    model: nn.Module,
    calls: Iterable[ModelCall],
    role: str,
    progress: Advancing | None = None,
    *,
    logits: LogitsOf | None = None,
    seed: int = 0,
) -> LogitRows:
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
    logits : LogitsOf, optional
        Which result is logits; by default the only one, of shape (N, C).
    seed : int
        Of the choice among pixels or tokens, of which at most 65536 rows and 256 MiB are kept, equally many of each sample;
        the same of every model that gives results of the same shapes. Tokens that a keyword argument ``attention_mask`` (N, T)
        marks as padding are left out.

    Returns
    -------
    LogitRows
        In float32 (float64 where the model computes in it).

    Raises
    ------
    CalibrationError
        When there is no batch, the model fails on one, or returns what is no logits, of another C than before, or not
        finite.
    """
    calls = list(calls)
    wanted = LogitsOf() if logits is None else logits
    generator = torch.Generator().manual_seed(seed)
    total = max(1, sum(call.rows for call in calls))
    parts: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    count, leaf, axis = 0, 0, 1
    with torch.no_grad(), evaluating(model):
        for number, call in enumerate(calls):
            output = run_call(model, call, f"calibration batch {number}", role)
            found, leaf, axis = _logits(model, output, number, role, wanted)
            _check(found, axis, number, role, parts[0].shape[1] if parts else None)
            most = max(1, min(_ROWS, _BYTES // (4 * max(1, found.shape[axis]))) // total)
            rows, counts = _sampled(found, axis, most, generator, _attended(call, found, axis))
            if rows.dtype not in (torch.float32, torch.float64):
                rows = rows.float()
            parts.append(np.array(rows.cpu().numpy()))
            owners.append(np.repeat(np.arange(count, count + len(found)), counts))
            count += len(found)
            if progress is not None:
                progress.update(1)
    if not count:
        raise no_calibration_batch()
    return LogitRows(np.concatenate(parts), np.concatenate(owners), leaf, axis)
