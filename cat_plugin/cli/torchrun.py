"""``cat-ptq quantize`` started by torchrun: the first process runs the command, the others do their share of each quantization.

What is not the engine's (the correction, scores, the bundle) is done by the first process alone; the others wait meanwhile.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist

from cat_plugin.batches import ModelCall, as_calls
from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.ranks import ALONE, Ranks, share_of

if TYPE_CHECKING:
    from torch import fx, nn

    from cat_plugin.ptq.report import QuantReport

__all__ = ["Leader", "follow", "joined"]

# The first process may score a model for hours, and the others wait.  One that ends closes its connections, and torchrun then
# ends all of them.
_PATIENCE = datetime.timedelta(days=1)


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that torchrun has started, while the block runs; one alone where it has not, or only one."""
    started = dist.is_available() and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1
    if not started:
        yield ALONE
        return
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Ranks.here()
    finally:
        dist.destroy_process_group()


def _share(calls: Iterable[ModelCall], spec: QuantSpec, ranks: Ranks, rows: int) -> list[ModelCall]:
    """A process's rows of those that all hold, as many at a time as they come."""
    mine = share_of(min(spec.num_samples, rows), spec.batch_size, ranks.rank, ranks.size)
    found, start = [], 0
    for call in calls:
        first, last = max(mine.start - start, 0), min(mine.stop - start, call.rows)
        if first < last:
            found.append(call.select(torch.arange(first, last)))
        start += call.rows
    return found


class Leader:
    """The engine as the first process calls it, with the others at work too.

    Parameters
    ----------
    ranks : Ranks
        All of them; the others are in :func:`follow`.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._followed = True

    def __call__(
        self, model: nn.Module, spec: QuantSpec, calls: Sequence[ModelCall], **how: Any
    ) -> tuple[fx.GraphModule, QuantReport]:
        """What :func:`cat_plugin.ptq.quantize` gives for all the calls."""
        self._followed = False  # an error inside ends the others as well
        self.ranks.told(json.dumps(spec.to_dict()).encode())
        share = _share(calls, spec, self.ranks, sum(call.rows for call in calls))
        result = quantize(model, spec, share, **how)
        self._followed = True
        return result

    def __enter__(self) -> Leader:
        return self

    def __exit__(self, *_: object) -> None:
        """Let the others go."""
        if self._followed:
            self.ranks.told(b"")


def follow(ranks: Ranks, model: nn.Module, batches: Sequence[Any]) -> None:
    """Do this process's share of every quantization that the first one begins, until it is done.

    Parameters
    ----------
    ranks : Ranks
        All processes.
    model : nn.Module
        The one that the first process quantizes.
    batches : sequence
        All calibration inputs, as the first process has them.
    """
    calls = list(as_calls(batches))
    rows = sum(call.rows for call in calls)
    while text := ranks.told(b""):
        spec = QuantSpec(**json.loads(text))
        quantize(model, spec, _share(calls, spec, ranks, rows))
