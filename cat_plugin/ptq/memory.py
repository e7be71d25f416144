"""What fitting the units is going to take, said before it begins."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, fx

from cat_plugin.ptq.graph.executor import last_uses
from cat_plugin.ptq.graph.ops import is_batched

__all__ = ["Expected", "expected"]


@dataclass(frozen=True)
class Expected:
    """Bytes beside the model and the caller's inputs.

    Attributes
    ----------
    memory, files : int
        Of activations in memory, those of single batches included, and in mapped files.
    """

    memory: int
    files: int

    def __str__(self) -> str:
        text = f"about {_size(self.memory)} of memory"
        return f"{text} and {_size(self.files)} of files" if self.files else text


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{max(count >> 20, 1)} MiB"


def _row(node: fx.Node) -> int:
    """Bytes of one row of a node's value that is kept; 0 where none is."""
    value = node.meta.get("val")
    if node.op in ("placeholder", "get_attr", "output") or not is_batched(node):
        return 0
    assert isinstance(value, Tensor)
    return math.prod(int(extent) for extent in value.shape[1:]) * value.element_size()


def expected(graph: fx.Graph, count: int, batch_size: int, budget: int | None) -> Expected:
    """Estimate the peak from the shapes in a graph.

    Parameters
    ----------
    graph : fx.Graph
        With quantizers; every value is kept in full precision and as quantized until its last reader has run.
    count : int
        Calibration inputs.
    batch_size : int
        Rows in one forward pass.
    budget : int or None
        Bytes that may be in memory at a time.
    """
    dying = last_uses(graph, {})
    alive = most = batch = 0
    for node in graph.nodes:
        alive += 2 * _row(node)
        most = max(most, alive)
        batch = max(batch, _row(node) + sum(map(_row, node.all_input_nodes)))
        alive -= 2 * sum(map(_row, dying.get(node, ())))
    kept = most * count
    held = kept if budget is None else min(kept, budget)
    return Expected(held + 2 * batch * min(batch_size, count), kept - held)
