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
from cat_plugin.ptq.graph.ops import (
    ACTIVATIONS,
    COMBINING,
    NORMS,
    is_batch_size,
    is_batched,
    is_call,
    operand,
    output_leaves,
    tensor_outputs,
)
from cat_plugin.ptq.quantizers.uniform import ActQuantizer

__all__ = ["Unit", "cuts_of", "find_units", "whole_model"]


@dataclass
class Unit:
    """A stretch of the graph: where one tensor passes, it has one in and one out.

    Attributes
    ----------
    name : str
        Name of the module it comes from, or of its layers.
    sources : tuple of fx.Node
        The tensors it reads (float, before its quantizers).
    outputs : tuple of fx.Node
        The tensors it makes and others read (float, before the next unit's quantizers), results of the model among them.
    nodes : list of fx.Node
        Everything in between in order of execution, ``outputs`` included.
    layers : list of QuantOp
        Quantized layers inside.
    quantizers : list of ActQuantizer
        Activation quantizers inside.
    """

    name: str
    sources: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    nodes: list[fx.Node]
    layers: list[QuantOp] = field(default_factory=list)
    quantizers: list[ActQuantizer] = field(default_factory=list)

    @property
    def source(self) -> fx.Node:
        """The tensor it reads, or the first of them."""
        return self.sources[0]

    @property
    def output(self) -> fx.Node:
        """The tensor it makes, or the last of them: what the next unit reads."""
        return self.outputs[-1]


def _module_path(node: fx.Node) -> list[tuple[str, str]]:
    """(name, class) of the modules around a node, outermost first, the model itself left out."""
    stack = node.meta.get("nn_module_stack") or {}
    return [
        (str(path), kind if isinstance(kind, str) else kind.__qualname__)
        for path, kind in stack.values()
        if path
    ]


def _collect(module: fx.GraphModule, source: fx.Node, nodes: list[fx.Node], fallback: str) -> Unit:
    sources: tuple[fx.Node, ...] = (source,)
    outputs: tuple[fx.Node, ...] = (nodes[-1],)
    if _has_sides(module.graph):
        sources, outputs = _read(nodes, source), _made(nodes)
    unit = Unit(fallback, sources, outputs, nodes)
    for node in nodes:
        child = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(child, QuantOp):
            unit.layers.append(child)
        elif isinstance(child, ActQuantizer):
            unit.quantizers.append(child)
    common = _common_module(module, nodes)
    unit.name = common[0] if common else "+".join(layer.name for layer in unit.layers) or fallback
    return unit


def _has_sides(graph: fx.Graph) -> bool:
    """Whether more goes into or comes out of the graph than one tensor, so that it has no simple cuts."""
    return sum(n.op == "placeholder" for n in graph.nodes) > 1 or len(output_leaves(graph)) > 1


def _read(nodes: list[fx.Node], first: fx.Node) -> tuple[fx.Node, ...]:
    """Batched tensors outside of ``nodes`` that they read, be it by way of what is computed anew for each batch."""
    inside, found, seen = set(nodes), dict.fromkeys([first]), set[fx.Node]()
    waiting = list(nodes)
    while waiting:
        for source in waiting.pop(0).all_input_nodes:
            if source in inside or source in seen or source.op == "get_attr" or is_batch_size(source):
                continue
            seen.add(source)
            if is_batched(source):
                found[source] = None
            else:
                waiting.append(source)
    return tuple(found)


def _is_rows(node: fx.Node) -> bool:
    return is_batched(node) and node.meta["val"].is_floating_point()


def _made(nodes: list[fx.Node]) -> tuple[fx.Node, ...]:
    """Batched tensors of real numbers that are read outside of ``nodes``, the last node at the end in any case."""
    inside = set(nodes)
    read = [n for n in nodes[:-1] if _is_rows(n)]
    return (*(n for n in read if any(u not in inside for u in n.users)), nodes[-1])


def _beside(graph: fx.Graph) -> set[fx.Node]:
    """What is computed from inputs without a layer, where the model has several.

    Masks and their like, which every part may read without being of one piece with all others.
    """
    if sum(n.op == "placeholder" for n in graph.nodes) < 2:
        return set()
    found: set[fx.Node] = set()
    for node in graph.nodes:
        computed = node.op == "call_function" and all(
            n in found or n.op == "get_attr" for n in node.all_input_nodes
        )
        if node.op == "placeholder" or computed:
            found.add(node)
    return found


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
    beside = _beside(graph)
    order = [
        n
        for n in graph.nodes
        if n.op not in ("get_attr", "output") and isinstance(n.meta.get("val"), Tensor) and n not in beside
    ]
    position = {n: i for i, n in enumerate(order)}
    reach = dict(position)
    several = len(output_leaves(graph)) > 1
    for node in order:
        for user in node.users:
            # one result of several is no dependency of what follows
            end = position[node] if several else len(order)
            reach[node] = max(reach[node], end if user.op == "output" else position.get(user, position[node]))
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
        return [_single(module, node) for node in _layer_nodes(module, graph.nodes) if is_batched(node)]
    # a quantizer, and what only moves or activates, is no place to cut: the float tensor behind it is
    cuts = [n for n in cuts_of(graph) if not _calls(module, n, ActQuantizer)]
    order = [n for n in graph.nodes if n.op not in ("get_attr", "output", "placeholder")]
    rank = {n: i for i, n in enumerate(order)}
    rounded = any(_calls(module, n, ActQuantizer) for n in graph.nodes)
    segments: list[tuple[fx.Node, list[fx.Node]]] = []
    placeholder = next(n for n in graph.nodes if n.op == "placeholder")
    # with one input it is the first cut; with several the first place where they are one
    source, start = (cuts.pop(0), 0) if cuts and cuts[0] is placeholder else (placeholder, 0)
    for cut in cuts:
        nodes = order[start : rank[cut] + 1]
        # cut right before a quantizer, if there are any, in a stream that norms read, or at the end, and only if there is a
        # layer to fit on this side
        ends = not rounded or all(
            _calls(module, u, ActQuantizer) or u.op == "output" or is_call(u, NORMS | COMBINING)
            for u in cut.users
        )
        if _layer_nodes(module, nodes) and ends:
            segments.append((source, nodes))
            source, start = cut, rank[cut] + 1
    rest = order[start:]
    while rest and not _is_rows(rest[-1]):  # a mean over the batch, or a class's number, is no result to fit
        rest.pop()
    if rest:
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


def whole_model(module: fx.GraphModule, outputs: Sequence[fx.Node] = ()) -> Unit:
    """The graph as one unit, from the inputs to the results, or to those among them that count."""
    graph = module.graph
    nodes = [n for n in graph.nodes if n.op not in ("get_attr", "output", "placeholder")]
    sources = tuple(n for n in graph.nodes if n.op == "placeholder")
    unit = _collect(module, sources[0], nodes, "model")
    unit.name = "model"
    unit.sources, unit.outputs = sources, tuple(outputs) or tuple(tensor_outputs(graph))
    return unit
