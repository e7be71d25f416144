"""What calibration says of the channels of each place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from cat_plugin.ptq.graph.ops import operand, weight_of
from cat_plugin.ptq.quantizers.observers import search_channel_ranges
from cat_plugin.ptq.rows import Rows
from cat_plugin.ptq.transforms.smoothing.places import Place, Side

__all__ = ["Ranges", "measure_ranges"]

_MOMENTUM = 0.99  # of the running mean of the middle
_SAMPLE = 1024  # positions that channels' ranges are searched on


@dataclass
class Ranges:
    """The channels of one place; each scale has one channel, or several that are looked at together.

    Attributes
    ----------
    low, high : Tensor
        (n,) least and greatest value that enters the readers.
    middle : Tensor
        (n,) running mean over batches of the middle between the two (momentum 0.99).
    clipped_low, clipped_high : Tensor
        (n,) the range in which the channel alone, on a grid of its own, has the least squared error.
    mean : Tensor
        (n,) of the sample.
    weight : Tensor
        (n,) greatest magnitude among the readers' weights.
    ratio : Tensor
        (n,) of queries and keys: greatest magnitude of those that are divided over that of those that are multiplied.
    samples : tuple of Tensor
        (rows, C) of what each reader reads.
    """

    low: Tensor
    high: Tensor
    middle: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    mean: Tensor
    weight: Tensor
    ratio: Tensor
    samples: tuple[Tensor, ...] = ()


class _Extremes(fx.Interpreter):
    """Least and greatest value of each channel of some nodes, by batch: node -> (2, C) of each; and some rows (n, C)."""

    def __init__(self, module: fx.GraphModule, nodes: set[fx.Node], rows: int) -> None:
        super().__init__(module)
        self.nodes, self.rows = nodes, rows
        self.found: dict[fx.Node, list[Tensor]] = {node: [] for node in nodes}
        self.samples: dict[fx.Node, list[Tensor]] = {node: [] for node in nodes}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.nodes:
            flat = value.reshape(-1, value.shape[-1])
            self.found[n].append(torch.stack([flat.amin(0), flat.amax(0)]))
            some = torch.linspace(0, len(flat) - 1, min(self.rows, len(flat)), device=flat.device).long()
            self.samples[n].append(flat[some])
        return value


def _gathered(place: Place, side: Side, values: Tensor, reduce: str) -> Tensor:
    """(n,) extreme of (C,) values of the side's channels over those with one scale."""
    start = -torch.inf if reduce == "amax" else torch.inf
    out = torch.full((place.count,), start, device=values.device)
    index = side.scales.to(values.device)
    return out.scatter_reduce(0, index, values[side.channels.to(values.device)].float(), reduce)


def _over_readers(place: Place, ends: dict[fx.Node, Tensor]) -> tuple[Tensor, Tensor]:
    """(n,) least and greatest of the (2, C) ends of what the readers read."""
    given = [(side, ends[operand(side.node)]) for side in place.readers]
    low = torch.stack([_gathered(place, side, values[0], "amin") for side, values in given]).amin(0)
    high = torch.stack([_gathered(place, side, values[1], "amax") for side, values in given]).amax(0)
    return low, high


def _product_ratio(place: Place, extremes: dict[fx.Node, Tensor]) -> Tensor:
    divided, multiplied = torch.zeros(place.count), torch.zeros(place.count)
    for side in place.sources:
        reach = extremes[side.node].abs().amax(0).cpu()
        for out, exponent in ((divided, 1), (multiplied, -1)):
            some = side.exponents == exponent
            out.scatter_reduce_(0, side.scales[some], reach[side.channels[some]], "amax")
    return divided.clamp(min=1e-6) / multiplied.clamp(min=1e-6)


@torch.no_grad()
def measure_ranges(
    module: fx.GraphModule, places: Sequence[Place], inputs: Rows, batch_size: int, bits: int = 8
) -> list[Ranges]:
    """Ranges of the channels of every place over the calibration inputs, (N, ...); searched for a grid of some bits."""
    watched = {side.node for place in places for side in place.sources if place.kind == "product"}
    watched |= {operand(side.node) for place in places for side in place.readers}
    ranks = inputs.ranks
    interpreter = _Extremes(module, watched, max(1, _SAMPLE * batch_size // ranks.extent(len(inputs)).total))
    for start in range(0, len(inputs), batch_size):
        interpreter.run(*inputs[start : start + batch_size].tensors)
    order = [node for node in module.graph.nodes if node in watched]  # of a set it may differ by process
    by_batch = {node: ranks.gather(torch.stack(interpreter.found[node])) for node in order}
    whole = {node: torch.stack([v[:, 0].amin(0), v[:, 1].amax(0)]) for node, v in by_batch.items()}
    samples = {node: ranks.gather(torch.cat(interpreter.samples[node])) for node in order}
    searched = {node: search_channel_ranges(some, bits) for node, some in samples.items()}
    out = []
    for place in places:
        ones = torch.ones(place.count)
        if place.kind == "product":
            out.append(
                Ranges(-ones, ones, 0 * ones, -ones, ones, 0 * ones, ones, _product_ratio(place, whole))
            )
            continue
        low, high = _over_readers(place, whole)
        reach = torch.stack(
            [_gathered(place, s, weight_of(module, s.node).abs().amax(0), "amax") for s in place.readers]
        ).amax(0)
        first = place.readers[0]
        batches = by_batch[operand(first.node)]
        middle: Tensor | None = None
        for batch in batches:
            now = (_gathered(place, first, batch[0], "amin") + _gathered(place, first, batch[1], "amax")) / 2
            middle = now if middle is None else _MOMENTUM * middle + (1 - _MOMENTUM) * now
        assert middle is not None
        clipped_low, clipped_high = (end.cpu() for end in _over_readers(place, searched))
        rows = tuple(samples[operand(side.node)] for side in place.readers)
        mean = _gathered(place, first, rows[0].mean(0), "amax").cpu()
        found = Ranges(
            low.cpu(), high.cpu(), middle.cpu(), clipped_low, clipped_high, mean, reach.cpu(), ones, rows
        )
        out.append(found)
    return out
