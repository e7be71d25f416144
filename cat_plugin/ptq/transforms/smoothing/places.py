"""Where channels may be scaled, and where they may be shifted as well, without changing what the network computes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from cat_plugin.ptq.graph.ops import constant, is_call
from cat_plugin.ptq.transforms.smoothing.labels import label_channels

__all__ = ["Place", "Side", "bias_argument", "find_places"]

_aten = torch.ops.aten


@dataclass
class Side:
    """Channels of one node at a place.

    Attributes
    ----------
    node : fx.Node
        What makes the channels, or a linear layer that reads them.
    channels : Tensor
        (n,) int64 which of the node's output channels, or input features.
    scales : Tensor
        (n,) int64 which of the place's scales each has.
    exponents : Tensor
        (n,) 1 or -1: to the power of which.
    """

    node: fx.Node
    channels: Tensor
    scales: Tensor
    exponents: Tensor


@dataclass
class Place:
    """Channels between the same makers and the same readers.

    With scales ``s`` and shifts ``z``, what is made becomes ``(x - z) / s`` and the readers' weights ``W diag(s)``, their
    biases ``b + W z``.  Between queries and keys there are no readers: ``q / s`` and ``k s``.

    Attributes
    ----------
    kind : str
        ``norm`` (behind a norm or a factor for each channel), ``product`` (queries and keys), ``linear`` (between linear layers).
    count : int
        Number of scales, each free.
    sources, readers : list of Side
        In order of execution.
    shifted : bool
        Whether channels may be shifted.
    products : list of fx.Node
        Products of queries and keys that read the channels.
    """

    kind: str
    count: int
    sources: list[Side] = field(default_factory=list)
    readers: list[Side] = field(default_factory=list)
    shifted: bool = False
    products: list[fx.Node] = field(default_factory=list)


def bias_argument(node: fx.Node) -> int | None:
    """Position of the bias among the arguments of a node that makes or reads channels; None where it can have none."""
    if is_call(node, {_aten.linear.default}):
        return 2
    if is_call(node, {_aten.addcmul.default}):
        return 0
    return 3 if is_call(node, {_aten.layer_norm.default}) else None


def _has_bias(module: fx.GraphModule, node: fx.Node) -> bool:
    index = bias_argument(node)
    return index is not None and len(node.args) > index and constant(module, node.args[index]) is not None


def find_places(module: fx.GraphModule) -> list[Place]:
    """Where channels may be scaled, in order of execution.

    Parameters
    ----------
    module : fx.GraphModule
        BatchNorm-folded ATen graph.

    Returns
    -------
    list of Place
        Together they hold each channel that may be scaled once.
    """
    found = label_channels(module)
    components = found.components
    sources: dict[int, dict[fx.Node, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
    readers: dict[int, dict[fx.Node, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
    for read in found.reads:
        for feature, number in enumerate(read.channels.tolist()):
            if number:
                root, exponent = components.find(number)
                readers[root][read.node].append((feature, exponent))
    multiplied = {components.find(number)[0]: node for number, node in found.products.items()}
    starts = [*found.sources.values()]
    ends = [*starts[1:], components.make(0)]
    for (node, start), end in zip(found.sources.items(), ends, strict=True):
        for number in range(start, end):
            root, exponent = components.find(number)
            if components.is_free(root) and (root in readers or root in multiplied):
                sources[root][node].append((number - start, exponent))
    grouped: dict[tuple[object, ...], list[int]] = {}
    for root, made in sources.items():
        key = (tuple(made), tuple(readers[root]), root in multiplied, components.is_shifted(root))
        grouped.setdefault(key, []).append(root)
    places = []
    for (makers, users, product, shifted), roots in grouped.items():
        assert isinstance(makers, tuple)
        assert isinstance(users, tuple)
        norm = not all(is_call(node, {_aten.linear.default}) for node in makers)
        place = Place("product" if product else "norm" if norm else "linear", len(roots))
        place.sources = [_side(node, [sources[root][node] for root in roots]) for node in makers]
        place.readers = [_side(node, [readers[root][node] for root in roots]) for node in users]
        place.products = list(dict.fromkeys(multiplied[root] for root in roots if root in multiplied))
        place.shifted = bool(
            shifted and not product and all(_has_bias(module, node) for node in (*makers, *users))
        )
        places.append(place)
    return places


def _side(node: fx.Node, members: list[list[tuple[int, int]]]) -> Side:
    """``members``: for each scale the channels of the node that have it, with exponents."""
    flat = [(channel, index, exponent) for index, some in enumerate(members) for channel, exponent in some]
    channels, scales, exponents = (torch.tensor(values) for values in zip(*flat, strict=True))
    return Side(node, channels, scales, exponents)
