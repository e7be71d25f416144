"""Layers between which channels may be scaled, and streams whose channels may be mixed, without another function."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from cat_plugin.ptq.graph.ops import (
    WEIGHTED,
    arguments,
    constant,
    groups_of,
    is_call,
    is_depthwise,
    is_relu6,
    operand,
    weight_of,
)

__all__ = [
    "LinearStream",
    "Pair",
    "activation_behind",
    "find_linear_streams",
    "find_pairs",
    "has_depthwise",
    "top_of",
]

_aten = torch.ops.aten


@dataclass
class Pair:
    """Two layers between which channels may be scaled.

    Attributes
    ----------
    first, second : fx.Node
        The layers; the second alone reads the first.
    activation : fx.Node or None
        ReLU or ReLU6 between them.
    depthwise : bool
        Whether the second has a filter for each channel.
    """

    first: fx.Node
    second: fx.Node
    activation: fx.Node | None
    depthwise: bool = False

    @property
    def readers(self) -> list[fx.Node]:
        """The second layer."""
        return [self.second]


def _is_weighted(node: fx.Node) -> bool:
    return is_call(node, WEIGHTED) and operand(node, 1).op == "get_attr"


def _is_rectifier(node: fx.Node) -> bool:
    return is_call(node, {_aten.relu.default}) or is_relu6(node)


def _reads_of_parameters(module: fx.GraphModule) -> Counter[object]:
    """How many nodes read each parameter: those of several are not to be changed for one."""
    return Counter(n.target for n in module.graph.nodes if n.op == "get_attr" for _ in n.users)


def _has_its_own(node: fx.Node, reads: Counter[object]) -> bool:
    """Whether nothing else reads a layer's weight and bias."""
    parameters = [p for p in node.args[1:3] if isinstance(p, fx.Node) and p.op == "get_attr"]
    return all(reads[p.target] == 1 for p in parameters)


def _is_zero_padding(node: fx.Node) -> bool:
    """Whether the node pads at most the last two axes, with zeros."""
    if not is_call(node, {_aten.constant_pad_nd.default, _aten.pad.default}):
        return False
    _, widths, *rest = arguments(node)
    mode = rest.pop(0) if rest and node.target is _aten.pad.default else "constant"
    return len(widths) <= 4 and mode == "constant" and not any(rest)


def _pair(node: fx.Node) -> Pair | None:
    """The layer that alone reads ``node``, with at most one ReLU or ReLU6 and zero padding between."""
    first, activation = node, None
    while len(node.users) == 1:
        (user,) = node.users
        if activation is None and node is first and _is_rectifier(user):
            activation = user
        elif _is_weighted(user) and user.args[0] is node:
            return Pair(first, user, activation)
        elif not _is_zero_padding(user):
            return None
        node = user
    return None


def has_depthwise(module: fx.GraphModule) -> bool:
    """Whether a convolution of the graph has a filter for each channel."""
    return any(is_depthwise(module, n) for n in module.graph.nodes if _is_weighted(n))


def find_pairs(module: fx.GraphModule) -> list[Pair]:
    """Every pair of layers between which channels may be scaled, in order of execution."""
    layers = [n for n in module.graph.nodes if _is_weighted(n)]
    reads = _reads_of_parameters(module)
    found = []
    for node in layers:
        pair = _pair(node)
        if pair is None or not all(_has_its_own(n, reads) for n in (pair.first, pair.second)):
            continue
        width, second = len(weight_of(module, node)), weight_of(module, pair.second)
        pair.depthwise = groups_of(pair.second) == width == second.shape[0]
        if pair.depthwise or (groups_of(pair.second) == 1 and second.shape[1] == width):
            found.append(pair)
    return found


def top_of(activation: fx.Node | None) -> float:
    """Where an activation clips, infinity if it does not."""
    return 6.0 if is_relu6(activation) else math.inf


@dataclass
class LinearStream:
    """A tensor, or a sum of several, that dense layers make and dense layers of kernel size 1 alone read.

    Attributes
    ----------
    width : int
        Channels.
    makers, readers : list of fx.Node
        The layers.
    """

    width: int
    makers: list[fx.Node] = field(default_factory=list)
    readers: list[fx.Node] = field(default_factory=list)


def _is_sum(node: fx.Node) -> bool:
    """Whether the node adds two activations with as many axes."""
    if not is_call(node, {_aten.add.Tensor}) or node.kwargs or len(node.args) != 2:
        return False
    values = [
        each.meta.get("val") for each in node.args if isinstance(each, fx.Node) and each.op != "get_attr"
    ]
    axes = [value.ndim for value in values if isinstance(value, Tensor)]
    return len(axes) == 2 and axes[0] == axes[1]


def _is_dense(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node is a layer with parameters of its own, a bias included, whose outputs read all inputs."""
    if not is_call(node, WEIGHTED) or groups_of(node) != 1 or len(node.args) < 3:
        return False
    return all(constant(module, node.args[index]) is not None for index in (1, 2))


def _reads(module: fx.GraphModule, node: fx.Node, source: fx.Node) -> bool:
    """Whether the node is a dense layer that sees one position of ``source`` at a time, and no padding."""
    if not _is_dense(module, node) or node.args[0] is not source or weight_of(module, node)[0, 0].numel() > 1:
        return False
    padding = 0 if is_call(node, {_aten.linear.default}) or len(node.args) < 5 else arguments(node)[4]
    widths = padding if isinstance(padding, list | tuple) else [0 if isinstance(padding, str) else padding]
    return not any(widths)


def _stream(module: fx.GraphModule, start: fx.Node) -> LinearStream | None:
    """The stream that a layer is a maker of; None where something touches it that a matrix does not commute with."""
    found, waiting, seen = LinearStream(len(weight_of(module, start))), [start], set[fx.Node]()
    linear = is_call(start, {_aten.linear.default})  # channels are the last axis
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if _is_sum(node):
            waiting += [operand(node, 0), operand(node, 1)]
        elif not _is_dense(module, node) or is_call(node, {_aten.linear.default}) != linear:
            return None
        elif len(weight_of(module, node)) != found.width:
            return None  # one channel is added to many
        else:
            found.makers.append(node)
        for user in node.users:
            if _is_sum(user):
                waiting.append(user)
            elif _reads(module, user, node) and is_call(user, {_aten.linear.default}) == linear:
                found.readers.append(user)
            elif not is_call(user, {_aten.sym_size.int}):
                return None
    return found if found.readers else None


def find_linear_streams(module: fx.GraphModule) -> list[LinearStream]:
    """Every stream whose channels may be mixed, in order of execution."""
    layers = [n for n in module.graph.nodes if _is_dense(module, n)]
    reads = _reads_of_parameters(module)
    streams: list[LinearStream] = []
    for node in layers:
        if any(node in stream.makers for stream in streams):
            continue
        stream = _stream(module, node)
        if stream is None or stream.width < 2:
            continue
        if all(_has_its_own(n, reads) for n in (*stream.makers, *stream.readers)):
            streams.append(stream)
    return streams


def activation_behind(node: fx.Node) -> fx.Node | None:
    """ReLU or ReLU6 that alone reads a layer's output."""
    users = list(node.users)
    return users[0] if len(users) == 1 and _is_rectifier(users[0]) else None
