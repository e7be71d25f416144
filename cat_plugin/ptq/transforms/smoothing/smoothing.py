"""Channels scaled and shifted, in closed form, wherever the graph permits it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from cat_plugin.ptq.rows import Rows
from cat_plugin.ptq.spec import QuantSpec
from cat_plugin.ptq.transforms.rotation.turns import decided_by_search, leave_unturned, turns
from cat_plugin.ptq.transforms.smoothing.fold import fold_place
from cat_plugin.ptq.transforms.smoothing.functions import insert_factors
from cat_plugin.ptq.transforms.smoothing.places import Place, find_places
from cat_plugin.ptq.transforms.smoothing.ranges import measure_ranges
from cat_plugin.ptq.transforms.smoothing.starts import STARTS, searched_strength
from cat_plugin.ptq.transforms.transform import Transform

__all__ = ["Smoothing"]

_WORTH = 0.9  # of the error without a rotation, what is left with one that is worth its time at run time


class Smoothing(Transform):
    """Scales and shifts behind norms, between queries and keys, values and projections, linear layers.

    Parameters
    ----------
    functions : bool
        Whether factors may be added to the graph behind functions that no scale commutes with.
    """

    name = "smoothing"

    def __init__(self, functions: bool = True) -> None:
        self.functions = functions

    def applies(self, module: fx.GraphModule, spec: QuantSpec) -> bool:
        return spec.smoothing is not None

    def places(self, module: fx.GraphModule) -> list[Place]:
        return find_places(module)

    @torch.no_grad()
    def fold(
        self, module: fx.GraphModule, inputs: Rows, spec: QuantSpec, generator: torch.Generator
    ) -> Callable[[fx.GraphModule], None] | None:
        assert spec.smoothing is not None
        start = STARTS[spec.smoothing]
        if start.functions and self.functions:
            insert_factors(module)
        places, behind = self.places(module), turns(module, spec)
        rotated = {layer: turn.rotated for layer, turn in behind.items()}
        for place, ranges in zip(
            places, measure_ranges(module, places, inputs, spec.batch_size, spec.a_bits), strict=True
        ):
            met = [behind[side.node] for side in place.readers if side.node in behind]
            strength, turned = spec.smoothing_strength, bool(met)
            if start.searches and place.readers:
                strength, loss = searched_strength(module, place, ranges, spec, rotated if met else None)
                if met and decided_by_search(spec):
                    plain, without = searched_strength(module, place, ranges, spec)
                    worth = _WORTH if any(turn.computed for turn in met) else 1.0
                    if loss >= without * worth:
                        strength, turned = plain, False
                        leave_unturned(side.node for side in place.readers)
            scales, shifts = start.choose(place, ranges, strength, turned)
            fold_place(module, place, scales, shifts)
        return None
