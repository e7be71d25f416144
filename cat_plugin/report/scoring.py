"""What models say of labelled samples: their logits, their scores, and what is kept of them over a tuning run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cat_plugin.errors import CATValueError
from cat_plugin.files import replacing, write_errors
from cat_plugin.report.metrics import Metric
from cat_plugin.report.metrics import top1 as share_right

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Labelled", "Scorer", "batches_of", "known", "logits_of", "top1"]

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.integer[Any]]

_KEPT = 2**28  # bytes of logits that are worth a file


def top1(logits: FloatArray, labels: IntArray | None) -> float:
    """Top-1 accuracy in percent; an error where there are no labels."""
    return 100 * share_right(logits, known(labels))


def known(labels: IntArray | None) -> IntArray:
    """The labels.

    Raises
    ------
    CATValueError
        When there are none.
    """
    if labels is None:
        raise CATValueError(
            "the data has no labels; add an array named labels, or class folders, to measure accuracy"
        )
    return labels


@dataclass(frozen=True)
class Labelled:
    """Samples to judge models by.

    Parameters
    ----------
    inputs : ndarray of shape (N, ...), float32
        Ready for the model.
    labels : ndarray of shape (N,), int64
        The right classes.
    names : list of str or None
        A name for each sample, such as its file.
    source : str
        Where they come from, for people.
    """

    inputs: FloatArray
    labels: IntArray
    names: list[str] | None = None
    source: str = ""

    def __len__(self) -> int:
        return len(self.labels)


def batches_of(inputs: FloatArray, size: int) -> Iterator[FloatArray]:
    """Inputs in batches of at most `size`."""
    return (inputs[start : start + size] for start in range(0, len(inputs), size))


def logits_of(model: nn.Module, inputs: FloatArray, batch_size: int) -> FloatArray:
    """Logits (N, C) of a model over inputs (N, ...)."""
    import torch

    with torch.no_grad():
        return np.concatenate(
            [model(torch.from_numpy(batch)).numpy() for batch in batches_of(inputs, batch_size)]
        )


class Scorer:
    """Scores models for the host's tuning.

    A corrected model is run once for both scores: its correction works on the logits alone.

    Parameters
    ----------
    samples : Labelled
        The data.
    batch_size : int
        Samples per batch.
    metric : callable
        Of logits and labels; top-1 accuracy as a share of one unless given.

    Attributes
    ----------
    full : ndarray of shape (N,), or None
        Classes that the full-precision model gives.
    kept : pathlib.Path or None
        Directory in which logits of quantized models are kept, so that a run that is resumed, or a trial with another
        correction alone, does not run the model again.
    """

    def __init__(self, samples: Labelled, batch_size: int, metric: Metric = share_right) -> None:
        self.samples, self._batch_size, self._metric = samples, batch_size, metric
        self._uncorrected: dict[int, float] = {}
        self.full: IntArray | None = None
        self.kept: Path | None = None
        self._classes: dict[int, tuple[IntArray, IntArray]] = {}

    def __call__(self, model: nn.Module) -> float:
        import torch

        step: Any = getattr(model, "correction", None)
        inner: Any = getattr(model, "model", None)
        if step is None or inner is None:
            logits = logits_of(model, self.samples.inputs, self._batch_size)
            if self.full is None:
                self.full = logits.argmax(1)
            return self._metric(logits, self.samples.labels)
        plain = self._plain_logits(inner)
        with torch.no_grad():
            logits = getattr(model, "corrected", step)(torch.from_numpy(plain)).numpy()
        self._classes[id(model)] = plain.argmax(1), logits.argmax(1)
        self._uncorrected[id(model)] = self._metric(plain, self.samples.labels)
        return self._metric(logits, self.samples.labels)

    def _plain_logits(self, inner: nn.Module) -> FloatArray:
        """Logits of a quantized model, which are on disk when the same model was run before on the same samples."""
        import torch
        from torch import fx

        from cat_plugin.models import fingerprint

        if self.kept is None or not isinstance(inner, fx.GraphModule):  # of others the code is not known
            return logits_of(inner, self.samples.inputs, self._batch_size)
        mark = fingerprint(inner, inner.code, torch.from_numpy(self.samples.inputs))
        path = self.kept / f"logits_{mark[:16]}.npy"
        if path.exists():
            try:
                found: FloatArray = np.load(path, allow_pickle=False)
            except (OSError, ValueError, EOFError):
                found = np.empty((0, 0))
            if len(found) == len(self.samples):
                return found
        logits = logits_of(inner, self.samples.inputs, self._batch_size)
        if logits.nbytes <= _KEPT:
            with write_errors(CATValueError, f"logits to {path}"), replacing(path) as stream:
                np.save(stream, logits)
        return logits

    def classes(self, model: nn.Module | None) -> tuple[IntArray, IntArray] | None:
        """Classes of a scored model without and with its correction; None when it was not scored so."""
        return self._classes.get(id(model))

    def uncorrected(self, model: nn.Module | None) -> float | None:
        """Score of a model without its correction, None when that is not known."""
        return self._uncorrected.get(id(model))
