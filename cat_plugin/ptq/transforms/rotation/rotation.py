"""Rotations of the residual stream, of heads and of feed-forward networks by Hadamard matrices with random signs.

A channel that is larger than all others spreads over all of them, so that a grid for a whole token serves each; the function
stays as it is (Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", arXiv 2404.00456, sections 4.1 and
4.2).  Between residual stream, norms and linear layers, and within the heads of attention, matrices are folded into the
weights and cost nothing at run time; behind a function or a gate they are computed, as two small matrices (:mod:`.online`),
where the specification says ``online``.  In front of LayerNorms, as vision transformers have them, the stream's matrix keeps the
mean of the channels (:func:`~.hadamard.mean_keeping`), so that the norm stays a LayerNorm.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from cat_plugin.ptq.rows import Rows
from cat_plugin.ptq.spec import QuantSpec
from cat_plugin.ptq.transforms.attention import AttentionHeads
from cat_plugin.ptq.transforms.rotation.hadamard import mean_keeping, orthogonal, orthogonal_factors
from cat_plugin.ptq.transforms.rotation.heads import Heads, Scores, find_heads, find_scores
from cat_plugin.ptq.transforms.rotation.online import FeedForward, find_feed_forwards
from cat_plugin.ptq.transforms.rotation.stream import ResidualStream, find_streams
from cat_plugin.ptq.transforms.rotation.turns import decided_by_search, is_unturned
from cat_plugin.ptq.transforms.smoothing.places import find_places
from cat_plugin.ptq.transforms.smoothing.ranges import measure_ranges
from cat_plugin.ptq.transforms.smoothing.starts import searched_strength
from cat_plugin.ptq.transforms.transform import Transform

__all__ = ["InnerRotation", "Rotation"]


class Rotation(Transform):
    """Residual streams: between makers and norms, before anything scales the channels behind these.

    Where ``searched`` scales follow, a stream is rotated only if the layers behind its norms then err less: networks whose channels
    are alike lose by it, since scales find nothing left to do.
    """

    name = "rotation"

    def applies(self, module: fx.GraphModule, spec: QuantSpec) -> bool:
        return spec.rotation is not None

    def places(self, module: fx.GraphModule) -> list[ResidualStream]:
        return find_streams(module)

    @torch.no_grad()
    def fold(
        self, module: fx.GraphModule, inputs: Rows, spec: QuantSpec, generator: torch.Generator
    ) -> Callable[[fx.GraphModule], None] | None:
        for index, stream in enumerate(self.places(module)):
            matrix = (mean_keeping if stream.centred else orthogonal)(stream.width, generator)
            if decided_by_search(spec):
                trial = _copied(module)
                find_streams(trial)[index].rotate(trial, matrix)
                readers = {node.name for node in stream.readers}
                losses = [_searched_losses(each, readers, inputs, spec) for each in (module, trial)]
                if losses[1] >= losses[0]:
                    continue
            stream.rotate(module, matrix)
        return None


def _copied(module: fx.GraphModule) -> fx.GraphModule:
    """The graph on tensors of its own, to be run by an interpreter."""
    graph, root = fx.Graph(), dict[str, Any]()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            value = operator.attrgetter(str(node.target))(module)
            root[str(node.target)] = value.clone() if isinstance(value, Tensor) else value
    return fx.GraphModule(root, graph)


def _searched_losses(module: fx.GraphModule, readers: set[str], inputs: Rows, spec: QuantSpec) -> float:
    """Sum of the logarithms of what the places in front of some layers lose by one batch, with searched scales."""
    places = [
        place
        for place in find_places(module)
        if place.kind == "norm" and place.readers and readers & {side.node.name for side in place.readers}
    ]
    ranges = measure_ranges(module, places, inputs.leading(spec.batch_size), spec.batch_size, spec.a_bits)
    found = [searched_strength(module, *pair, spec)[1] for pair in zip(places, ranges, strict=True)]
    return sum(math.log(max(loss, 1e-30)) for loss in found)


class InnerRotation(Transform):
    """Heads of attention, and where the specification says ``online`` what enters the last layer of a feed-forward network.

    It comes behind the scales and shifts of channels, which take their part of the outliers first: behind GELU both together leave
    a third of the error of scales alone, and three quarters of that of a rotation alone (docs/benchmarks/ptq_history.md).
    """

    name = "inner rotation"

    def applies(self, module: fx.GraphModule, spec: QuantSpec) -> bool:
        return spec.rotation is not None

    def places(self, module: fx.GraphModule) -> list[Heads | FeedForward | Scores]:
        heads = [place for place in find_heads(module) if not is_unturned(place.reader)]
        last = [place for place in find_feed_forwards(module) if not is_unturned(place.layer)]
        return [*heads, *last, *find_scores(module)]

    @torch.no_grad()
    def fold(
        self, module: fx.GraphModule, inputs: Rows, spec: QuantSpec, generator: torch.Generator
    ) -> Callable[[fx.GraphModule], None] | None:
        attention = AttentionHeads()
        later = attention.places(module) if attention.applies(module, spec) else []
        for place in self.places(module):
            if isinstance(place, Scores) and place.product in later:
                continue  # they are rotated there, and of two such matrices one may undo the other
            if isinstance(place, Heads | Scores):
                place.rotate(module, orthogonal(place.size, generator))
            elif spec.rotation == "online":
                place.rotate(module, *orthogonal_factors(place.width, generator))
        return None
