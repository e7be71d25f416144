"""Rotations of the residual stream, of heads and of feed-forward networks by Hadamard matrices with random signs.

A channel that is larger than all others spreads over all of them, so that a grid for a whole token serves each; the function
stays as it is (Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", arXiv 2404.00456, sections 4.1 and
4.2).  Between residual stream, norms and linear layers, and within the heads of attention, matrices are folded into the
weights and cost nothing at run time; behind a function or a gate they are computed, as two small matrices (:mod:`.online`),
where the specification says ``online``.  In front of LayerNorms, as vision transformers have them, the stream's matrix keeps the
mean of the channels (:func:`~.hadamard.mean_keeping`), so that the norm stays a LayerNorm.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from cat_plugin.ptq.rows import Rows
from cat_plugin.ptq.spec import QuantSpec
from cat_plugin.ptq.transforms.rotation.hadamard import factors_of, mean_keeping, orthogonal
from cat_plugin.ptq.transforms.rotation.heads import Heads, Scores, find_heads, find_scores
from cat_plugin.ptq.transforms.rotation.online import FeedForward, find_feed_forwards
from cat_plugin.ptq.transforms.rotation.stream import ResidualStream, find_streams
from cat_plugin.ptq.transforms.transform import Transform

__all__ = ["Rotation"]


class Rotation(Transform):
    """Hadamard matrices wherever the graph permits them."""

    name = "rotation"

    def applies(self, module: fx.GraphModule, spec: QuantSpec) -> bool:
        return spec.rotation is not None

    def places(self, module: fx.GraphModule) -> list[ResidualStream | Heads | FeedForward | Scores]:
        return [*find_streams(module), *find_heads(module), *find_feed_forwards(module), *find_scores(module)]

    @torch.no_grad()
    def fold(
        self, module: fx.GraphModule, inputs: Rows, spec: QuantSpec, generator: torch.Generator
    ) -> Callable[[fx.GraphModule], None] | None:
        for place in self.places(module):
            if isinstance(place, ResidualStream):
                matrix = mean_keeping if place.centred else orthogonal
                place.rotate(module, matrix(place.width, generator))
            elif isinstance(place, Heads | Scores):
                place.rotate(module, orthogonal(place.size, generator))
            elif spec.rotation == "online":
                a, b = factors_of(place.width)
                place.rotate(module, orthogonal(a, generator), orthogonal(b, generator))
        return None
