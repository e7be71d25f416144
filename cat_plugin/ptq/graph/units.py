"""Units of reconstruction, found from the graph.

A node through which everything behind it depends on everything before it (and through nothing else) is a cut; the
graph between two cuts is a segment.  A residual or inverted-residual block is one segment because its shortcut goes
around the layers inside; in a chain every layer is a segment.  Chain segments that belong to one module of the same
class as a segment with a shortcut are joined (an inverted residual without shortcut), and the user may name modules
to be joined (BRECQ, arXiv 2102.05426, section 3.2: the block is the unit that balances dependency inside against
generalisation).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from cat_plugin.ptq.graph.modules import QuantOp
from cat_plugin.ptq.graph.ops import ACTIVATIONS, is_batched, is_call, operand
from cat_plugin.ptq.quantizers.uniform import ActQuantizer

__all__ = ["Unit", "cuts_of", "find_units", "whole_model"]


@dataclass
class Unit:
    """A stretch of the graph with one tensor in and one out.

    Attributes
    ----------
    name : str
        Name of the module it comes from, or of its layers.
    source : fx.Node
        The tensor it reads (float, before its quantizers).
    output : fx.Node
        The tensor it makes (float, before the next unit's quantizers).
    nodes : list of fx.Node
        Everything in between in order of execution, ``output`` included.
    layers : list of QuantOp
        Quantized layers inside.
    quantizers : list of ActQuantizer
        Activation quantizers inside.
    """

    name: str
    source: fx.Node
    output: fx.Node
    nodes: list[fx.Node]
    layers: list[QuantOp] = field(default_factory=list)
    quantizers: list[ActQuantizer] = field(default_factory=list)


def _module_path(node: fx.Node) -> list[tuple[str, str]]:
    """(name, class) of the modules around a node, outermost first, the model itself left out."""
    stack = node.meta.get("nn_module_stack") or {}
    return [
        (str(path), kind if isinstance(kind, str) else kind.__qualname__)
        for path, kind in stack.values()
        if path
    ]


def _collect(module: fx.GraphModule, source: fx.Node, nodes: list[fx.Node], fallback: str) -> Unit:
    unit = Unit(fallback, source, nodes[-1], nodes)
    for node in nodes:
        child = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(child, QuantOp):
            unit.layers.append(child)
        elif isinstance(child, ActQuantizer):
            unit.quantizers.append(child)
    common = _common_module(module, nodes)
    unit.name = common[0] if common else "+".join(layer.name for layer in unit.layers) or fallback
    return unit


def _calls(module: fx.GraphModule, node: fx.Node, kind: type[nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), kind)


def _layer_nodes(module: fx.GraphModule, nodes: Iterable[fx.Node]) -> list[fx.Node]:
    return [n for n in nodes if _calls(module, n, QuantOp)]


def _common_module(module: fx.GraphModule, nodes: list[fx.Node]) -> tuple[str, str] | None:
    """Innermost module that holds all the layers among ``nodes``."""
    return _innermost([_module_path(n) for n in _layer_nodes(module, nodes)])


def _block_module(module: fx.GraphModule, nodes: list[fx.Node]) -> tuple[str, str] | None:
    """Innermost module that holds the layers and the operations between and behind them, such as a block's addition."""
    inside = [n for n in nodes if n.op == "call_function"]
    return _innermost([_module_path(n) for n in inside + _layer_nodes(module, nodes)])


def _innermost(paths: list[list[tuple[str, str]]]) -> tuple[str, str] | None:
    if not paths:
        return None
    common = None
    for level in zip(*paths, strict=False):
        if len({name for name, _ in level}) != 1:
            break
        common = level[0]
    return common


def cuts_of(graph: fx.Graph) -> list[fx.Node]:
    """Tensor nodes through which all that follows depends on all that precedes."""
    order = [
        n for n in graph.nodes if n.op not in ("get_attr", "output") and isinstance(n.meta.get("val"), Tensor)
    ]
    position = {n: i for i, n in enumerate(order)}
    reach = dict(position)
    for node in order:
        for user in node.users:
            reach[node] = max(
                reach[node], len(order) if user.op == "output" else position.get(user, position[node])
            )
    cuts, furthest = [], -1
    for i, node in enumerate(order):
        if furthest <= i and is_batched(node):
            cuts.append(node)
        furthest = max(furthest, reach[node])
    return cuts


def find_units(module: fx.GraphModule, names: Sequence[str] = (), granularity: str = "block") -> list[Unit]:
    """Split a prepared graph into units.

    Parameters
    ----------
    module : fx.GraphModule
        With quantizers inserted.
    names : sequence of str
        Name patterns of modules that are to be one unit each.
    granularity : {"layer", "block", "model"}
        ``layer``: each layer with its input quantizer and the activation behind it; ``block``: the graph cut where
        one tensor passes; ``model``: a single unit.

    Returns
    -------
    list of Unit
        In the order of execution, each with at least one quantized layer; blocks together cover the graph.
    """
    if granularity == "model":
        return [whole_model(module)]
    graph = module.graph
    if granularity == "layer":
        return [_single(module, node) for node in _layer_nodes(module, graph.nodes)]
    # a quantizer, and what only moves or activates, is no place to cut: the float tensor behind it is
    cuts = [n for n in cuts_of(graph) if not _calls(module, n, ActQuantizer)]
    order = [n for n in graph.nodes if n.op not in ("get_attr", "output", "placeholder")]
    rank = {n: i for i, n in enumerate(order)}
    segments: list[tuple[fx.Node, list[fx.Node]]] = []
    source, start = cuts[0], 0
    for cut in cuts[1:]:
        nodes = order[start : rank[cut] + 1]
        # cut right before a quantizer or at the end, and only if there is a layer to fit on this side
        ends = all(_calls(module, u, ActQuantizer) or u.op == "output" for u in cut.users)
        if _layer_nodes(module, nodes) and ends:
            segments.append((source, nodes))
            source, start = cut, rank[cut] + 1
    if start < len(order):
        rest = order[start:]
        if _layer_nodes(module, rest) or not segments:
            segments.append((source, rest))
        else:
            segments[-1][1].extend(rest)
    segments = _join(module, segments, names)
    return [_collect(module, src, nodes, f"unit{i}") for i, (src, nodes) in enumerate(segments)]


def _single(module: fx.GraphModule, node: fx.Node) -> Unit:
    quantizer = operand(node)
    nodes = [quantizer, node]
    while len(nodes[-1].users) == 1:
        (user,) = nodes[-1].users
        if not is_call(user, ACTIVATIONS):
            break
        nodes.append(user)
    return _collect(module, operand(quantizer), nodes, node.name)


def _join(
    module: fx.GraphModule, segments: list[tuple[fx.Node, list[fx.Node]]], names: Sequence[str]
) -> list[tuple[fx.Node, list[fx.Node]]]:
    residual_classes = set()
    for _, nodes in segments:
        common = _block_module(module, nodes)
        if common and len(_layer_nodes(module, nodes)) > 1:
            residual_classes.add(common[1])

    def owner(nodes: list[fx.Node]) -> str | None:
        paths = [_module_path(n) for n in _layer_nodes(module, nodes)]
        for pattern in names:
            for name, _ in paths[0] if paths else []:
                if fnmatch.fnmatchcase(name, pattern) and all(name in dict(p) for p in paths):
                    return name
        for name, kind in paths[0] if paths else []:
            if kind in residual_classes and all(name in dict(p) for p in paths):
                return name
        return None

    joined: list[tuple[fx.Node, list[fx.Node]]] = []
    last: str | None = None
    for source, nodes in segments:
        current = owner(nodes)
        if joined and current is not None and current == last:
            joined[-1][1].extend(nodes)
        else:
            joined.append((source, list(nodes)))
        last = current
    return joined


def whole_model(module: fx.GraphModule) -> Unit:
    """The graph as one unit, from the input to the logits."""
    graph = module.graph
    source = next(n for n in graph.nodes if n.op == "placeholder")
    nodes = [n for n in graph.nodes if n.op not in ("get_attr", "output", "placeholder")]
    unit = _collect(module, source, nodes, "model")
    unit.name = "model"
    output = next(n for n in graph.nodes if n.op == "output")
    unit.output = output.args[0]
    return unit
