"""What fitting the units is going to take, said before it begins, and how much of it goes through an operation at a time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from cat_plugin.ptq.closed_form.moments import PATCHES, ROWS
from cat_plugin.ptq.graph.executor import last_uses, pass_bytes, rows_of_a_pass
from cat_plugin.ptq.graph.modules import QuantOp
from cat_plugin.ptq.graph.ops import elements, is_batched, row_bytes

__all__ = ["Expected", "expected", "rows_of_the_model"]


@dataclass(frozen=True)
class Expected:
    """Bytes beside the model and the caller's inputs.

    Attributes
    ----------
    cached, files : int
        Of activations that are kept, in memory and in mapped files.
    working : int
        Of what one operation, or the fit of one layer, takes meanwhile.
    """

    cached: int
    working: int
    files: int

    @property
    def memory(self) -> int:
        """Bytes in memory."""
        return self.cached + self.working

    def __str__(self) -> str:
        text = f"about {_size(self.memory)} of memory"
        return f"{text} and {_size(self.files)} of files" if self.files else text


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{max(count >> 20, 1)} MiB"


def _fit_bytes(node: fx.Node, layer: QuantOp, count: int, batch_size: int) -> int:
    """What the fit of a layer in closed form takes.

    Three sets of moments in float64, what is solved for with them, copies of its weight and covariance (as many as a layer of 1280
    inputs and 1000 outputs was measured to take); and for each output position of a batch what the
    position reads, a bounded number of values at a time, three times.
    """
    inputs, outputs = layer.weight[0].numel(), len(layer.weight)
    covariance, weight = 8 * layer.groups * inputs * inputs, 8 * outputs * inputs
    value = node.meta.get("val")
    positions = 1
    if layer.kind != "linear" and isinstance(value, Tensor) and is_batched(node):
        positions = elements(value.shape[2:])
    rows = min(batch_size * positions, ROWS * batch_size // max(count, 1) + batch_size)
    read = layer.groups * inputs
    patches = 3 * 4 * min(rows * read, max(PATCHES, positions * read)) if layer.kind != "linear" else 0
    return 20 * (covariance + weight) + patches


def expected(module: fx.GraphModule, count: int, batch_size: int, budget: int | None) -> Expected:
    """Estimate the peak from the shapes in a graph.

    Parameters
    ----------
    module : fx.GraphModule
        With quantizers; every value is kept in full precision and as quantized until its last reader has run.
    count : int
        Calibration inputs.
    batch_size : int
        Rows in one forward pass at most.
    budget : int or None
        Bytes that may be in memory at a time.
    """
    graph, batch_size = module.graph, min(batch_size, count)
    dying = last_uses(graph, {})
    alive = most = working = 0
    for node in graph.nodes:
        alive += 2 * _kept(node)
        most = max(most, alive)
        rows = rows_of_a_pass(pass_bytes(node), batch_size, budget)
        working = max(working, pass_bytes(node) * rows)
        child = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(child, QuantOp):
            working = max(working, _fit_bytes(node, child, count, batch_size))
        alive -= 2 * sum(map(_kept, dying.get(node, ())))
    kept = most * count
    held = kept if budget is None else min(kept, max(budget - working, 0))
    return Expected(held, working, kept - held)


def _kept(node: fx.Node) -> int:
    """Bytes of one row of a node's value that is kept; inputs are the caller's."""
    return 0 if node.op == "placeholder" else row_bytes(node)


def rows_of_the_model(graph: fx.Graph, most: int, budget: int | None) -> int:
    """Rows that are run through the whole model at a time."""
    return rows_of_a_pass(max(pass_bytes(node) for node in graph.nodes), most, budget)
