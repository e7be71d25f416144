"""Rotations of the residual stream, of heads and of feed-forward networks by Hadamard matrices with random signs.

A channel that is larger than all others spreads over all of them, so that a grid for a whole token serves each; the function
stays as it is (Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", arXiv 2404.00456, sections 4.1 and
4.2).  Between residual stream, norms and linear layers, and within the heads of attention, matrices are folded into the
weights and cost nothing at run time; behind a function or a gate they are computed, as two small matrices (:mod:`.online`),
where the specification says ``online``.  In front of LayerNorms, as vision transformers have them, the stream's matrix keeps the
mean of the channels (:func:`~.hadamard.mean_keeping`), so that the norm stays a LayerNorm.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, fx

from cat_plugin.ptq.rows import Rows
from cat_plugin.ptq.spec import QuantSpec
from cat_plugin.ptq.transforms.rotation.hadamard import factors_of, mean_keeping, orthogonal
from cat_plugin.ptq.transforms.rotation.heads import Heads, Scores, find_heads, find_scores
from cat_plugin.ptq.transforms.rotation.online import FeedForward, find_feed_forwards
from cat_plugin.ptq.transforms.rotation.stream import ResidualStream, find_streams
from cat_plugin.ptq.transforms.transform import Transform

__all__ = ["InnerRotation", "Rotation", "turns"]

Turn = Callable[[Tensor], Tensor]


class Rotation(Transform):
    """Residual streams: between makers and norms, before anything scales the channels behind these."""

    name = "rotation"

    def applies(self, module: fx.GraphModule, spec: QuantSpec) -> bool:
        return spec.rotation is not None

    def places(self, module: fx.GraphModule) -> list[ResidualStream]:
        return find_streams(module)

    @torch.no_grad()
    def fold(
        self, module: fx.GraphModule, inputs: Rows, spec: QuantSpec, generator: torch.Generator
    ) -> Callable[[fx.GraphModule], None] | None:
        for stream in self.places(module):
            matrix = mean_keeping if stream.centred else orthogonal
            stream.rotate(module, matrix(stream.width, generator))
        return None


class InnerRotation(Transform):
    """Heads of attention, and where the specification says ``online`` what enters the last layer of a feed-forward network.

    It comes behind the scales and shifts of channels, which take their part of the outliers first: together they leave an
    activation behind GELU a third of the error that either leaves (docs/benchmarks/ptq_history.md).
    """

    name = "inner rotation"

    def applies(self, module: fx.GraphModule, spec: QuantSpec) -> bool:
        return spec.rotation is not None

    def places(self, module: fx.GraphModule) -> list[Heads | FeedForward | Scores]:
        return [*find_heads(module), *find_feed_forwards(module), *find_scores(module)]

    @torch.no_grad()
    def fold(
        self, module: fx.GraphModule, inputs: Rows, spec: QuantSpec, generator: torch.Generator
    ) -> Callable[[fx.GraphModule], None] | None:
        for place in self.places(module):
            if isinstance(place, Heads | Scores):
                place.rotate(module, orthogonal(place.size, generator))
            elif spec.rotation == "online":
                place.rotate(module, *_factors(place, generator))
        return None


def _factors(place: FeedForward, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    a, b = factors_of(place.width)
    return orthogonal(a, generator), orthogonal(b, generator)


def turns(module: fx.GraphModule, spec: QuantSpec) -> dict[fx.Node, Turn]:
    """What :class:`InnerRotation` is going to do to the rows, (n, C), that a linear layer reads, and to those of its weight.

    The signs are not those that it will draw, which decides little.
    """
    found: dict[fx.Node, Turn] = {}
    if spec.rotation is None:
        return found
    generator = torch.Generator().manual_seed(0)
    for heads in find_heads(module):
        found[heads.reader] = functools.partial(heads.turned, rotation=orthogonal(heads.size, generator))
    if spec.rotation == "online":
        for place in find_feed_forwards(module):
            a, b = _factors(place, generator)
            found[place.layer] = functools.partial(place.turned, a=a, b=b)
    return found
