"""Runs a prepared graph node by node over the whole calibration set, in batches.

A value is kept while a node that is still to run reads it, so that the peak is a few activations and not the whole
network's.  Values whose first axis is not the batch (symbolic sizes, folded axes) are recomputed for each batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["Executor"]


class Executor:
    """Values of a graph's nodes for all calibration inputs.

    Parameters
    ----------
    module : fx.GraphModule
        Graph with one placeholder.
    inputs : Tensor
        (N, ...) calibration inputs.
    batch_size : int
        Rows in one forward pass.
    """

    def __init__(self, module: fx.GraphModule, inputs: Tensor, batch_size: int) -> None:
        self.module = module
        self.batch_size = batch_size
        self.count = len(inputs)
        placeholder = next(n for n in module.graph.nodes if n.op == "placeholder")
        value = placeholder.meta["val"]
        self.batch_symbol = value.shape[0]
        self.values: dict[fx.Node, Tensor] = {placeholder: inputs}

    def batched(self, node: fx.Node) -> bool:
        """Whether the first axis of the node's value is the batch."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.ndim == 0 or node.op == "get_attr":
            return False
        return str(value.shape[0]) == str(self.batch_symbol) and not isinstance(value.shape[0], int)

    def value(self, node: Any, rows: slice) -> Any:
        """Value of ``node`` for some rows; what is not kept is recomputed from what is."""
        return self._value(node, rows, {})

    def _value(self, node: Any, rows: slice, memo: dict[fx.Node, Any]) -> Any:
        if node in self.values:
            return self.values[node][rows]
        if node in memo:
            return memo[node]
        if node.op == "get_attr":
            return getattr(self.module, node.target)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self._value(n, rows, memo))
        if node.op == "call_module":
            result = self.module.get_submodule(node.target)(*args, **kwargs)
        elif node.op == "call_method":
            result = getattr(args[0], node.target)(*args[1:], **kwargs)
        else:
            result = node.target(*args, **kwargs)
        memo[node] = result
        return result

    @torch.no_grad()
    def run(self, node: fx.Node, compute: Callable[[fx.Node, slice], Any] | None = None) -> None:
        """Compute and keep a node's value for all rows (nothing is kept if its first axis is not the batch)."""
        if node.op in ("placeholder", "get_attr", "output") or not self.batched(node):
            return
        self.values.pop(node, None)
        parts = []
        for start in range(0, self.count, self.batch_size):
            rows = slice(start, min(start + self.batch_size, self.count))
            parts.append(compute(node, rows) if compute else self.value(node, rows))
        self.values[node] = parts[0] if len(parts) == 1 else torch.cat(parts)

    def drop(self, nodes: list[fx.Node]) -> None:
        """Forget values."""
        for node in nodes:
            self.values.pop(node, None)
