"""What rotations behind the scales of channels will do to what linear layers read, and which of them are left out.

Scales are chosen before these rotations are made, for what the rotation then makes of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from cat_plugin.ptq.spec import QuantSpec
from cat_plugin.ptq.transforms.rotation.hadamard import orthogonal, orthogonal_factors
from cat_plugin.ptq.transforms.rotation.heads import find_heads
from cat_plugin.ptq.transforms.rotation.online import find_feed_forwards

__all__ = ["Turn", "decided_by_search", "is_unturned", "leave_unturned", "turns"]

_UNTURNED = "unturned"  # of a node's meta: its input is better as it is


@dataclass(frozen=True)
class Turn:
    """What a rotation does to the rows, (n, C), that a layer reads, and to those of its weight.

    Attributes
    ----------
    rotated : callable
        Takes them there.
    computed : bool
        Whether it takes time while the network runs.
    """

    rotated: Callable[[Tensor], Tensor]
    computed: bool


def leave_unturned(layers: Iterable[fx.Node]) -> None:
    """Keep the inner rotation from what some layers read."""
    for layer in layers:
        layer.meta[_UNTURNED] = True


def is_unturned(layer: fx.Node) -> bool:
    """Whether :func:`leave_unturned` was told of the layer."""
    return bool(layer.meta.get(_UNTURNED))


def turns(module: fx.GraphModule, spec: QuantSpec) -> dict[fx.Node, Turn]:
    """What the inner rotation is going to do in front of linear layers, if nothing keeps it from them.

    The signs are not those that it will draw, which decides little.
    """
    found: dict[fx.Node, Turn] = {}
    if spec.rotation is None:
        return found
    generator = torch.Generator().manual_seed(0)
    for heads in find_heads(module):
        rotation = orthogonal(heads.size, generator)
        found[heads.reader] = Turn(functools.partial(heads.turned, rotation=rotation), False)
    if spec.rotation == "online":
        for place in find_feed_forwards(module):
            a, b = orthogonal_factors(place.width, generator)
            found[place.layer] = Turn(functools.partial(place.turned, a=a, b=b), True)
    return found


def decided_by_search(spec: QuantSpec) -> bool:
    """Whether searched scales decide where rotations stand; the grids of tokens, which gain most by them, are not what they try."""
    return spec.rotation is not None and spec.smoothing == "searched" and spec.a_granularity == "tensor"
