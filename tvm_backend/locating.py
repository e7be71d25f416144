"""Finds the first node of a program whose result a library computes otherwise, by bisection over the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from cat_plugin.graph.inspect import signature
from cat_plugin.graph.sampling import Runner

__all__ = ["first_difference", "prefix_of"]

Differs = Callable[[Any, tuple[torch.Tensor, ...]], bool | None]
"""Whether the library of a program computes something else than the program for some rows; None where that cannot be told."""


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _cuts(graph: fx.Graph) -> list[tuple[fx.Node, list[fx.Node]]]:
    """Places between two nodes where only floating-point tensors are handed on, with those that depend on the inputs."""
    nodes = list(graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    computed: set[fx.Node] = set()
    for node in nodes:
        if any(each.op == "placeholder" or each in computed for each in node.all_input_nodes):
            computed.add(node)
    live: list[fx.Node] = []
    found = []
    for i, node in enumerate(nodes[:-1]):
        live = [each for each in live if any(place[user] > i for user in each.users)]
        if node not in computed or not isinstance(node.meta.get("val"), torch.Tensor):
            continue  # a size, or what is the same whatever is given
        live.append(node)
        if all(map(_is_float, live)):
            found.append((node, list(live)))
    return found


def prefix_of(
    module: fx.GraphModule, values: list[fx.Node], run: tuple[torch.Tensor, ...], batched: list[bool]
) -> Any:
    """The part of a program that computes some of its values.

    Parameters
    ----------
    module : GraphModule
        The program's module.
    values : list of Node
        What the part returns.
    run : tuple of Tensor
        Inputs, flat and in order.
    batched : list of bool
        For each input whether its first axis is the batch.

    Returns
    -------
    torch.export.ExportedProgram
        Of the inputs, flat and in order.
    """
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.graph_copy(module.graph, copies)
    graph.output(tuple(copies[value] for value in values))
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    part = fx.GraphModule(module, graph)
    batch = torch.export.Dim("batch", min=1)
    shapes = tuple({0: batch} if rows else None for rows in batched)
    with torch.no_grad():
        return torch.export.export(part, run, dynamic_shapes=shapes)


def first_difference(program: Any, inputs: tuple[Any, ...], differs: Differs) -> fx.Node | None:
    """Find the first node whose result differs.

    Nothing is wrong in front of the first node and something behind the last, so halving the stretch between a cut whose
    values are right and one of which some are wrong ends at a node that makes the difference.

    Parameters
    ----------
    program : torch.export.ExportedProgram
        Its library computes something else.
    inputs : tuple of ndarray
        Rows, flat and in order.
    differs : callable
        Compiles a part of the program and compares it on rows.

    Returns
    -------
    Node or None
        None where the program cannot be cut.
    """
    module = Runner(program).module
    batched = [
        bool(each["shape"]) and isinstance(each["shape"][0], str) for each in signature(program)["inputs"]
    ]
    # Of one row alone torch.export would not believe that there may be more.
    run = tuple(
        torch.from_numpy(np.resize(each, (max(2, len(each)), *each.shape[1:])) if rows else each)
        for each, rows in zip(inputs, batched, strict=True)
    )
    cuts = _cuts(module.graph)
    right, wrong = -1, len(cuts) - 1
    unknown: set[int] = set()
    while left := [i for i in range(right + 1, wrong) if i not in unknown]:
        middle = left[len(left) // 2]
        answer = differs(prefix_of(module, cuts[middle][1], run, batched), run)
        if answer is None:
            unknown.add(middle)
        elif answer:
            wrong = middle
        else:
            right = middle
    return cuts[wrong][0] if cuts else None
