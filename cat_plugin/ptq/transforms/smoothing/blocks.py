"""Stretches of the graph on which scales and shifts are trained, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from cat_plugin.ptq.graph.ops import layer_name
from cat_plugin.ptq.graph.units import cuts_of
from cat_plugin.ptq.transforms.smoothing.places import Place

__all__ = ["Block", "find_blocks"]


@dataclass
class Block:
    """A stretch with one tensor in and one out.

    Attributes
    ----------
    name : str
        Of its first place's first layer, or of its last node.
    source, output : fx.Node
        What it reads and what it makes.
    nodes : list of fx.Node
        Everything behind ``source``, in order of execution, ``output`` included.
    places : list of Place
        Those inside.
    """

    name: str
    source: fx.Node
    output: fx.Node
    nodes: list[fx.Node]
    places: list[Place]


def find_blocks(module: fx.GraphModule, places: Sequence[Place]) -> list[Block]:
    """Cut the graph behind every place where one tensor passes and no channel is scaled across the cut.

    Blocks follow each other from the input to the output of the graph.
    """
    order = [n for n in module.graph.nodes if n.op not in ("get_attr", "output")]
    rank = {node: index for index, node in enumerate(order)}
    spans = []
    for place in places:
        makers = [rank[side.node] for side in place.sources]
        users = [rank[side.node] for side in place.readers] + [rank[node] for node in place.products]
        spans.append((min(makers), max(users)))
    cuts = cuts_of(module.graph)
    blocks, start = [], rank[cuts[0]]
    for cut in cuts[1:]:
        end = rank[cut]
        inside = [p for p, (a, b) in zip(places, spans, strict=True) if start < a and b <= end]
        crossed = any(a <= end < b for a, b in spans)
        if (inside and not crossed) or cut is cuts[-1]:
            name = layer_name(inside[0].sources[0].node if inside else cut)
            blocks.append(Block(name, order[start], cut, order[start + 1 : end + 1], inside))
            start = end
    return blocks
