"""Calibration data of Neural Compressor 2.x: calls of ours as a loader of the host, and a model run over any loader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from cat_plugin.batches import ModelCall, read_batch

__all__ = ["CallLoader", "feed"]


class CallLoader:
    """Calibration calls as the host's data loader: batches of inputs, each with a label that nobody reads.

    Parameters
    ----------
    calls : list of ModelCall
        At least one.
    """

    def __init__(self, calls: list[ModelCall]) -> None:
        self.calls = calls
        self.batch_size = max(1, calls[0].rows)

    def __iter__(self) -> Iterator[tuple[Any, torch.Tensor]]:
        for call in self.calls:
            inputs: Any = dict(call.kwargs) if call.kwargs else call.args
            if not call.kwargs and len(call.args) == 1:
                inputs = call.args[0]
            yield inputs, torch.zeros(0)

    def samples(self) -> int:
        """Samples in all, at most."""
        return self.batch_size * len(self.calls)


def feed(model: nn.Module, dataloader: Any, samples: int) -> None:
    """Run a model over a loader of the host, which yields inputs with or without labels.

    Parameters
    ----------
    model : torch.nn.Module
        Called once a batch.
    dataloader : iterable
        Of batches as :func:`cat_plugin.batches.read_batch` reads them.
    samples : int
        After so many it is enough.
    """
    seen = 0
    for number, batch in enumerate(dataloader):
        call = read_batch(batch, f"calibration batch {number}")
        model(*call.args, **call.kwargs)
        seen += max(1, call.rows)
        if seen >= samples:
            return
