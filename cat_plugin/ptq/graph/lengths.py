"""Graphs of models that read tokens, made to take sequences of any length up to the one that they were traced at.

A trace writes the length into the graph: as a size to reshape to, as the end of a slice, into tables of positions and masks.
Traced once more at another length, the model itself shows which numbers these are and how they follow the length, and of
which constants less is taken.  The graph at a third length is compared with the model there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from cat_plugin.equivalence import Equivalence
from cat_plugin.ptq.rows import Inputs

__all__ = ["any_length", "follow_length", "token_axis"]

_aten = torch.ops.aten
#: Under which a node keeps its name and what of it follows the length: axes of a constant, paths of numbers in arguments.
_MARK = "follows_length"


def token_axis(inputs: Inputs) -> int | None:
    """Length of the sequences (N, T, ...) where the first input is integers (N, T); None where it is anything else."""
    first = inputs.tensors[0]
    if first.is_floating_point() or first.ndim != 2 or first.shape[1] < 4:
        return None
    return int(first.shape[1])


def _cut(inputs: Inputs, length: int) -> Inputs:
    whole = token_axis(inputs)
    return inputs.mapped(lambda x: x[:, :length] if x.ndim > 1 and x.shape[1] == whole else x)


def _numbers(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], int | float]]:
    """Numbers in arguments, each with the way to it."""
    if isinstance(value, int | float):
        yield path, value
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _numbers(item, (*path, place))
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(item, (*path, name))


def follow_length(
    module: fx.GraphModule, model: nn.Module, inputs: Inputs, trace: Callable[[Inputs], fx.GraphModule]
) -> str | None:
    """Mark what in a graph follows the length of the sequences, once it computes what the model does at a third length.

    Parameters
    ----------
    module : fx.GraphModule
        As traced; its nodes are marked.
    model : nn.Module
        The caller's.
    inputs : Inputs
        Of the length that it was traced at, (N, T) integers first.
    trace : callable
        Traces the model for other inputs.

    Returns
    -------
    str or None
        Why the graph keeps its length; None where it is marked.
    """
    length = token_axis(inputs)
    assert length is not None
    reason = _mark(module, inputs, length, trace)
    if reason is None:
        graph = fx.Graph()
        nodes: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(module.graph, nodes))
        any_length(graph, nodes)
        third = _cut(inputs, max(2, length // 3))
        copied = fx.GraphModule(module, graph)
        copied.meta.update(module.meta)
        try:
            Equivalence(model, third.call).check("lengths", copied, locate=False)
        except Exception as error:
            reason = f"at {max(2, length // 3)} tokens it is not what the model is: {error}"
    if reason is not None:
        for node in module.graph.nodes:
            node.meta.pop(_MARK, None)
    return reason


def _mark(
    module: fx.GraphModule, inputs: Inputs, length: int, trace: Callable[[Inputs], fx.GraphModule]
) -> str | None:
    """Mark what follows the length, by a trace at another one; the reason where that cannot be."""
    shorter = length // 2 + 1
    try:
        other = trace(_cut(inputs, shorter))
    except Exception as error:  # in the model's own words
        return f"at {shorter} tokens the model cannot be traced: {error}"
    nodes, others = list(module.graph.nodes), list(other.graph.nodes)
    if [(n.op, n.target if n.op == "call_function" else n.name) for n in nodes] != [
        (n.op, n.target if n.op == "call_function" else n.name) for n in others
    ]:
        return f"at {shorter} tokens the model does something else than at {length}"
    marks: dict[fx.Node, Any] = {}
    for node, twin in zip(nodes, others, strict=True):
        if node.op == "get_attr":
            a, b = getattr(module, str(node.target)), getattr(other, str(twin.target))
            if a.ndim != b.ndim:
                return f"the constant {node.target} is of another kind at {shorter} tokens"
            axes = [axis for axis in range(a.ndim) if a.shape[axis] != b.shape[axis]]
            part = a
            for axis in axes:
                if (a.shape[axis], b.shape[axis]) != (length, shorter):
                    return f"the constant {node.target} has another size at {shorter} tokens"
                part = part.narrow(axis, 0, shorter)
            if not torch.equal(part, b):
                return f"the constant {node.target} has other values at {shorter} tokens"
            if axes:
                marks[node] = axes
        else:
            mine, theirs = dict(_numbers((node.args, node.kwargs))), dict(_numbers((twin.args, twin.kwargs)))
            if mine.keys() != theirs.keys():
                return f"{node.name} has other arguments at {shorter} tokens"
            found = {}
            for path, number in mine.items():
                if number != theirs[path]:
                    slope, rest = divmod(number - theirs[path], length - shorter)
                    if rest or not isinstance(number, int):
                        return f"{node.name} has arguments that do not follow the length evenly"
                    found[path] = (int(slope), int(number - slope * length))
            if found:
                marks[node] = found
    for node, mark in marks.items():
        node.meta[_MARK] = (node.name, mark)
    return None


def any_length(graph: fx.Graph, nodes: dict[fx.Node, fx.Node]) -> None:
    """Let a copy of a marked graph follow the length of its first input, in place.

    Parameters
    ----------
    graph : fx.Graph
        The copy.
    nodes : dict
        Node of the marked graph -> its copy.
    """
    # what is put behind a node may have its meta, mark included
    marked = [node for node in nodes if node.meta.get(_MARK, ("",))[0] == node.name]
    if not marked:
        return
    first = next(n for n in graph.nodes if n.op == "placeholder")
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        length = graph.call_function(_aten.sym_size.int, (first, 1))
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in marked:
        copy, mark = nodes[node], node.meta[_MARK][1]
        if node.op == "get_attr":
            for axis in mark:
                users = sorted(copy.users, key=order.__getitem__)
                with graph.inserting_before(users[0]):
                    part = graph.call_function(_aten.slice.Tensor, (copy, axis, 0, length))
                for user in users:
                    user.replace_input_with(copy, part)
                order[part] = order[users[0]]
                copy = part
            continue
        with graph.inserting_before(copy):
            for path, (slope, rest) in mark.items():
                value: Any = length
                if slope != 1:
                    value = graph.call_function(operator.mul, (value, slope))
                if rest:
                    value = graph.call_function(operator.add, (value, rest))
                copy.args, copy.kwargs = _with((copy.args, copy.kwargs), path, value)


def _with(value: Any, path: tuple[Any, ...], number: Any) -> Any:
    """Nested arguments with another number at the end of a path."""
    if not path:
        return number
    first, *rest = path
    if isinstance(value, dict):
        return {**value, first: _with(value[first], tuple(rest), number)}
    items = [_with(item, tuple(rest), number) if i == first else item for i, item in enumerate(value)]
    return tuple(items) if isinstance(value, tuple) else items
