"""The scores of a tuning run, kept for models with and without their correction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cat_plugin.cli.options import top1

if TYPE_CHECKING:
    from torch import nn

    from cat_plugin.cli.data import Samples

__all__ = ["Scorer", "logits_of"]


def logits_of(model: nn.Module, samples: Samples, batch_size: int) -> np.ndarray:
    """Logits (N, C) of a model over samples."""
    import torch

    with torch.no_grad():
        return np.concatenate(
            [model(torch.from_numpy(batch)).numpy() for batch in samples.batches(batch_size)]
        )


class Scorer:
    """Top-1 accuracy as a share of one, for the host's tuning.

    A corrected model is run once for both scores: its correction works on the logits alone.

    Parameters
    ----------
    samples : Samples
        Labelled.
    batch_size : int
        Samples per batch.

    Attributes
    ----------
    full : ndarray of shape (N,), or None
        Classes that the full-precision model gives.
    """

    def __init__(self, samples: Samples, batch_size: int) -> None:
        top1(np.zeros((len(samples), 1)), samples.labels)
        self.samples, self._batch_size = samples, batch_size
        self.full: np.ndarray | None = None
        self._classes: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, model: nn.Module) -> float:
        import torch

        step: Any = getattr(model, "correction", None)
        inner: Any = getattr(model, "model", None)
        if step is None or inner is None:
            logits = logits_of(model, self.samples, self._batch_size)
            if self.full is None:
                self.full = logits.argmax(1)
            return top1(logits, self.samples.labels) / 100
        plain = logits_of(inner, self.samples, self._batch_size)
        with torch.no_grad():
            logits = step(torch.from_numpy(plain)).numpy()
        self._classes[id(model)] = plain.argmax(1), logits.argmax(1)
        return top1(logits, self.samples.labels) / 100

    def classes(self, model: nn.Module | None) -> tuple[np.ndarray, np.ndarray] | None:
        """Classes of a scored model without and with its correction; None when it was not scored so."""
        return self._classes.get(id(model))

    def uncorrected(self, model: nn.Module | None) -> float | None:
        """Score of a model without its correction, None when that is not known."""
        classes = self.classes(model)
        labels = self.samples.labels
        return None if classes is None or labels is None else float((classes[0] == labels).mean())
