"""Channels scaled and shifted, in closed form, wherever the graph permits it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from cat_plugin.ptq.rows import Rows
from cat_plugin.ptq.spec import QuantSpec
from cat_plugin.ptq.transforms.smoothing.fold import fold_place
from cat_plugin.ptq.transforms.smoothing.places import Place, find_places
from cat_plugin.ptq.transforms.smoothing.ranges import measure_ranges
from cat_plugin.ptq.transforms.smoothing.starts import STARTS
from cat_plugin.ptq.transforms.transform import Transform

__all__ = ["Smoothing"]


class Smoothing(Transform):
    """Scales and shifts behind norms, between queries and keys, values and projections, linear layers."""

    name = "smoothing"

    def applies(self, module: fx.GraphModule, spec: QuantSpec) -> bool:
        return spec.smoothing is not None

    def places(self, module: fx.GraphModule) -> list[Place]:
        return find_places(module)

    @torch.no_grad()
    def fold(
        self, module: fx.GraphModule, inputs: Rows, spec: QuantSpec, generator: torch.Generator
    ) -> Callable[[fx.GraphModule], None] | None:
        assert spec.smoothing is not None
        places = self.places(module)
        start = STARTS[spec.smoothing]
        for place, ranges in zip(
            places, measure_ranges(module, places, inputs, spec.batch_size), strict=True
        ):
            scales, shifts = start.choose(place, ranges, spec.smoothing_strength)
            fold_place(module, place, scales, shifts)
        return None
