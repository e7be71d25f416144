"""Follows every channel of a norm or linear layer through the graph, to find out who reads it and what it may suffer.

The graph is run once on one row; beside each value that consists of a layer's channels runs a tensor of the same shape
that holds the channels' numbers.  What only moves values is applied to the numbers as it stands, so that heads, windows,
chunks, class tokens and repeated keys need no rules of their own.  Behind anything that is not known to commute with a
scale the numbers end, and these channels stay as they are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from cat_plugin.ptq.graph.ops import MOVING, NORMS, SOFTMAX, arguments, constant, is_call, operand
from cat_plugin.ptq.transforms.smoothing.components import Components

__all__ = ["Labels", "Reads", "label_channels"]

_aten = torch.ops.aten
_PADS = frozenset({_aten.pad.default, _aten.constant_pad_nd.default})
_MOVES = (MOVING - _PADS) | {
    operator.getitem,
    _aten.cat.default,
    _aten.chunk.default,
    _aten.flip.default,
    _aten.index_select.default,
    _aten.movedim.int,
    _aten.narrow.default,
    _aten.repeat.default,
    _aten.repeat_interleave.self_int,
    _aten.roll.default,
    _aten.split.Tensor,
    _aten.split_with_sizes.default,
    _aten.stack.default,
    _aten.unbind.int,
}


@dataclass
class Reads:
    """Which channels a linear layer reads.

    Attributes
    ----------
    node : fx.Node
        The layer.
    channels : Tensor
        (I,) int64 number of the channel that each input feature is; 0 for none, or none that may be scaled.
    """

    node: fx.Node
    channels: Tensor


@dataclass
class Labels:
    """What became of all channels.

    Attributes
    ----------
    components : Components
        Which channels are tied to each other, and which must stay as they are.
    sources : dict of fx.Node to int
        Node that makes channels, in order of execution -> number of its first one.
    reads : list of Reads
        In order of execution.
    products : dict of int to fx.Node
        Number of a query's channel -> product of queries and keys that it enters.
    """

    components: Components = field(default_factory=Components)
    sources: dict[fx.Node, int] = field(default_factory=dict)
    reads: list[Reads] = field(default_factory=list)
    products: dict[int, fx.Node] = field(default_factory=dict)


def label_channels(module: fx.GraphModule) -> Labels:
    """Follow the channels of all norms and linear layers of a BatchNorm-folded graph."""
    rows = [
        torch.zeros((1, *value.shape[1:]), dtype=value.dtype, device=_device(module))
        for value in (n.meta["val"] for n in module.graph.nodes if n.op == "placeholder")
    ]
    tracker = _Tracker(module)
    with torch.no_grad():
        tracker.run(*rows)
    return tracker.found


def _device(module: fx.GraphModule) -> torch.device:
    return next((tensor.device for tensor in module.buffers()), torch.device("cpu"))


def _numbers(labels: Tensor) -> list[int]:
    """Channels that occur."""
    for axis, stride in enumerate(labels.stride()):
        if stride == 0 and labels.shape[axis] > 0:
            labels = labels.narrow(axis, 0, 1)
    return [number for number in torch.unique(labels).tolist() if number]


def _is_softmax(node: Any) -> bool:
    """Whether the rows, along the last axis, of a node's value sum up to one."""
    while is_call(node, {_aten.expand.default, _aten.clone.default, _aten.contiguous.default}):
        node = node.args[0]
    return is_call(node, SOFTMAX) and node.args[1] in (-1, node.meta["val"].ndim - 1)


class _Tracker(fx.Interpreter):
    """Runs the graph with the channels' numbers beside its values."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.graph_module = module
        self.found = Labels()
        self.labels: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        found = self._through(n, value)
        source = self._new_channels(n, value)
        if source is not None:
            found = source
        if found is not None:
            self.labels[n] = found
        for node in self.user_to_last_uses.get(n, ()):
            self.labels.pop(node, None)
        return value

    def _new_channels(self, node: fx.Node, value: Any) -> Tensor | None:
        """Numbers for the channels that a norm, a linear layer or a factor for each channel makes."""
        if is_call(node, {_aten.linear.default}):
            weight = constant(self.graph_module, node.args[1])
            width = None if weight is None else len(weight)
        elif is_call(node, NORMS):
            weight = constant(self.graph_module, node.args[2]) if len(node.args) > 2 else None
            width = None if weight is None or weight.ndim != 1 else len(weight)
        elif is_call(node, {_aten.mul.Tensor}) and not any(n in self.labels for n in node.all_input_nodes):
            factor = next((c for a in node.args if (c := constant(self.graph_module, a)) is not None), None)
            alike = factor is not None and factor.ndim == 1 and value.ndim > 1
            width = len(factor) if alike and factor is not None and len(factor) == value.shape[-1] else None
        elif is_call(node, {_aten.addcmul.default}) and node.args[1] not in self.labels:
            factor = constant(self.graph_module, node.args[2])
            width = None if factor is None or factor.ndim != 1 else len(factor)
        else:
            return None
        if width is None:
            return None
        start = self.found.components.make(width)
        self.found.sources[node] = start
        return torch.arange(start, start + width, device=value.device).expand(value.shape)

    def _through(self, node: fx.Node, value: Any) -> Any:
        """Numbers behind the node; None where they end."""
        labelled = [n for n in node.all_input_nodes if n in self.labels]
        if not labelled:
            return None
        rule = _Tracker.RULES.get(node.target) if node.op == "call_function" else None
        if rule is None and node.op == "call_function" and node.target in _MOVES:
            return self._moved(node)
        if rule is not None:
            return rule(self, node, value)
        self._end(*labelled)
        return None

    def _end(self, *nodes: fx.Node) -> None:
        """What the nodes hold must not be scaled."""
        for node in nodes:
            found = self.labels.get(node, ())
            for labels in [found] if isinstance(found, Tensor) else found:
                self._block(labels)

    def _block(self, labels: Tensor) -> None:
        for number in _numbers(labels):
            self.found.components.block(number)

    def _keep_zero(self, labels: Tensor) -> Tensor:
        for number in _numbers(labels):
            self.found.components.keep_zero(number)
        return labels

    def _moved(self, node: fx.Node) -> Any:
        def labels(n: fx.Node) -> Any:
            if n in self.labels:
                return self.labels[n]
            value = self.env[n]
            if isinstance(value, Tensor) and value.is_floating_point():
                return torch.zeros_like(value, dtype=torch.int64)
            return value

        args, kwargs = fx.map_arg((node.args, node.kwargs), labels)
        target: Any = node.target
        return target(*args, **kwargs)

    def _linear(self, node: fx.Node, value: Tensor) -> None:
        source = operand(node)
        if source not in self.labels or constant(self.graph_module, node.args[1]) is None:
            self._end(*node.all_input_nodes)
            return
        flat = self.labels[source].reshape(-1, self.labels[source].shape[-1])
        first = flat[0]
        same = (flat == first).all(0)
        self._block(flat[:, ~same])
        self.found.reads.append(Reads(node, torch.where(same, first, 0)))

    def _scaled(self, node: fx.Node, value: Tensor) -> Tensor | None:
        """A product of channels and something else, or a quotient of which they are the dividend."""
        first, *others = node.args
        labelled = [n for n in node.all_input_nodes if n in self.labels]
        if len(labelled) > 1 or (node.target is _aten.div.Tensor and first not in self.labels):
            self._end(*labelled)
            return None
        if first is others[0]:  # the square
            self._end(*labelled)
            return None
        return self._keep_zero(self.labels[labelled[0]]).broadcast_to(value.shape)

    def _homogeneous(self, node: fx.Node, value: Tensor) -> Tensor:
        return self._keep_zero(self.labels[operand(node)])

    def _sum(self, node: fx.Node, value: Tensor) -> Tensor | None:
        labelled = [n for n in node.args[:2] if isinstance(n, fx.Node) and n in self.labels]
        if len(labelled) < 2:
            self._end(*labelled)
            return None
        first, second = (self.labels[n].broadcast_to(value.shape) for n in labelled)
        self._tie(first, second, 1)
        return self._keep_zero(first)

    def _tie(self, first: Tensor, second: Tensor, exponent: int) -> None:
        pairs = torch.unique(torch.stack([first.reshape(-1), second.reshape(-1)]), dim=1).T.tolist()
        components = self.found.components
        for a, b in pairs:
            if a and b:
                components.tie(a, b, exponent)
                components.keep_zero(a)
            elif a or b:
                components.block(a or b)

    def _mean(self, node: fx.Node, value: Tensor) -> Tensor | None:
        labels: Tensor = self.labels[operand(node)]
        axes = arguments(node)[1]
        keep = bool(node.args[2]) if len(node.args) > 2 else False
        low, high = labels.amin(axes, keep), labels.amax(axes, keep)
        if not torch.equal(low, high):
            self._end(operand(node))
            return None
        return low

    def _along(self, labels: Tensor, axis: int) -> Tensor | None:
        """Numbers that are the same all along an axis, without it; None, and blocked, where they are not."""
        first = labels.select(axis, 0)
        if bool((labels == first.unsqueeze(axis)).all()):
            return first
        self._block(labels)
        return None

    def _product(self, node: fx.Node, queries: Tensor | None, keys: Tensor | None) -> None:
        """Numbers (..., D) of what is multiplied and summed over D."""
        if queries is None or keys is None or queries.shape != keys.shape:
            for labels in (queries, keys):
                if labels is not None:
                    self._block(labels)
            return
        self._tie(queries, keys, -1)
        for number in _numbers(queries):
            self.found.products[number] = node

    def _attention(self, node: fx.Node, value: Tensor) -> Tensor | None:
        query, key, values, *rest = arguments(node)
        if node.kwargs.get("enable_gqa") or (len(rest) > 4 and rest[4]):
            self._end(*[n for n in (query, key, values) if n in self.labels])
            return None
        sides = [self._along(self.labels[n], -2) if n in self.labels else None for n in (query, key)]
        self._product(node, *sides)
        mask = rest[0] if rest else node.kwargs.get("attn_mask")
        if isinstance(mask, fx.Node):
            self._end(mask)
        return self._averaged(node, values, value, mask is None)

    def _averaged(self, node: fx.Node, values: Any, result: Tensor, shifted: bool) -> Tensor | None:
        """Behind a weighted sum over the second axis from the end."""
        if values not in self.labels:
            return None
        labels = self._along(self.labels[values], -2)
        if labels is None:
            return None
        labels = labels.unsqueeze(-2).broadcast_to(result.shape)
        return labels if shifted else self._keep_zero(labels)

    def _matmul(self, node: fx.Node, value: Tensor) -> Tensor | None:
        first, second = operand(node, 0), operand(node, 1)
        if any(self.env[n].ndim < 2 for n in (first, second)):
            self._end(first, second)
            return None
        if first in self.labels:
            sides = [
                self._along(self.labels[n], axis) if n in self.labels else None
                for n, axis in ((first, -2), (second, -1))
            ]
            self._product(node, *sides)
            return None
        return self._averaged(node, second, value, _is_softmax(first))

    RULES: ClassVar[dict[Any, Callable[[_Tracker, fx.Node, Any], Any]]] = {
        _aten.linear.default: _linear,
        _aten.mul.Tensor: _scaled,
        _aten.div.Tensor: _scaled,
        _aten.neg.default: _homogeneous,
        _aten.relu.default: _homogeneous,
        _aten.leaky_relu.default: _homogeneous,
        _aten.add.Tensor: _sum,
        _aten.sub.Tensor: _sum,
        _aten.mean.dim: _mean,
        _aten.scaled_dot_product_attention.default: _attention,
        _aten.matmul.default: _matmul,
        _aten.bmm.default: _matmul,
    }
