"""Values of channels at positions drawn at random from calibration inputs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from cat_plugin.ptq.rows import Rows

__all__ = ["ChannelSampler"]

_aten = torch.ops.aten


class ChannelSampler(fx.Interpreter):
    """Keeps values of some nodes at positions drawn at random, and each channel's extremes: (C, n) for each node.

    Positions are drawn for a batch, which is run in pieces: what is drawn does not depend on how large these are.

    Parameters
    ----------
    module : fx.GraphModule
        BatchNorm-folded ATen graph.
    nodes : set of fx.Node
        Convolutions, linear layers and what is computed from them channel by channel.
    share : int
        Positions of each batch.
    generator : torch.Generator
        CPU generator of the positions.
    averaged : collection of fx.Node
        Whose channels' means and mean squares, over all positions, are kept as well.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        nodes: set[fx.Node],
        share: int,
        generator: torch.Generator,
        averaged: Collection[fx.Node] = (),
    ) -> None:
        super().__init__(module)
        self.averaged = averaged
        self._sums: dict[fx.Node, Tensor] = {}
        self._counts: dict[fx.Node, int] = {}
        self.nodes, self.share, self.generator = nodes, share, generator
        self.samples: dict[fx.Node, list[Tensor]] = {node: [] for node in nodes}
        self.extremes: dict[fx.Node, list[Tensor]] = {node: [] for node in nodes}
        self._drawn: dict[fx.Node, Tensor] = {}
        self._rows, self._start = 0, 0

    def run_batch(self, batch: Rows, piece: int) -> None:
        """Run a batch, `piece` rows at a time."""
        self._rows, self._drawn = len(batch), {}
        for self._start in range(0, len(batch), piece):
            self.run(*batch[self._start : self._start + piece].tensors)

    def taken(self, node: fx.Node) -> Tensor:
        """(C, n) values of a node."""
        return torch.cat(self.samples[node], 1)

    def means(self, node: fx.Node) -> Tensor:
        """(C,) float64 means of a node's channels."""
        return self._sums[node][0] / self._counts[node]

    def mean_squares(self, node: fx.Node) -> Tensor:
        """(C,) float64 mean squares of a node's channels."""
        return self._sums[node][1] / self._counts[node]

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n not in self.nodes and n not in self.averaged:
            return value
        # the last axis of what linear layers make and read
        linear = any(each.target is _aten.linear.default for each in (n, *n.users))
        channels = value.ndim - 1 if linear else 1
        rows = value.movedim(channels, -1).flatten(1, -2) if value.ndim > 2 else value.unsqueeze(1)
        if n in self.averaged:
            sums = torch.stack(
                [rows.sum((0, 1), dtype=torch.float64), rows.square().sum((0, 1), dtype=torch.float64)]
            )
            self._sums[n] = self._sums[n] + sums if n in self._sums else sums
            self._counts[n] = self._counts.get(n, 0) + rows.shape[:2].numel()
        if n in self.nodes:
            self._keep(n, rows)
        return value

    def _keep(self, n: fx.Node, rows: Tensor) -> None:
        if n not in self._drawn:
            count = self._rows * rows.shape[1]
            self._drawn[n] = torch.randint(count, (self.share,), generator=self.generator)
            self.samples[n].append(rows.new_empty(rows.shape[2], self.share))
        index = self._drawn[n] - self._start * rows.shape[1]
        here = (index >= 0) & (index < rows.shape[:2].numel())
        row, position = index[here] // rows.shape[1], index[here] % rows.shape[1]
        found = rows[row.to(rows.device), position.to(rows.device)]
        self.samples[n][-1][:, here.to(rows.device)] = found.T
        self.extremes[n].append(torch.stack([rows.amin((0, 1)), rows.amax((0, 1))], 1))
