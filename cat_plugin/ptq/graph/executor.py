"""Runs a prepared graph node by node over the whole calibration set, in batches.

A value is kept while a node that is still to run reads it, so that the peak is a few activations and not the whole
network's.  Values whose first axis is not the batch (symbolic sizes, folded axes) are recomputed for each batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from cat_plugin.ptq.cache import TensorStore
from cat_plugin.ptq.graph.ops import is_batch_size, is_batched, row_bytes
from cat_plugin.ptq.rows import Rows

__all__ = ["Executor", "first_inputs", "last_uses", "pass_bytes", "rows_of", "rows_of_a_pass"]

_PASS = 64 << 20  # bytes that a pass may always take


def pass_bytes(node: fx.Node) -> int:
    """Bytes that computing one row of a node's value takes.

    Operands and result, an operation's own copies, and what the C library keeps of values that were freed: measured, four times
    the first.
    """
    return 4 * (row_bytes(node) + sum(map(row_bytes, node.all_input_nodes)))


def rows_of_a_pass(size: int, most: int, budget: int | None) -> int:
    """Rows computed at a time, when one takes `size` bytes: as many as take a third of the budget, or a little in any case.

    Sums over rows computed in other portions may differ in their last bit.
    """
    return most if budget is None else max(1, min(most, max(budget // 3, _PASS) // max(size, 1)))


class Executor:
    """Values of a graph's nodes for all calibration inputs.

    Parameters
    ----------
    module : fx.GraphModule
        Graph of flat tensors.
    inputs : Tensor or Rows
        (N, ...) calibration inputs, one for each placeholder.
    batch_size : int
        Rows in one forward pass at most; fewer of large values where the store has a budget.
    store : TensorStore
        Where values are kept.
    call : callable
        (module, input) -> output, for layers and quantizers.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        inputs: Tensor | Rows,
        batch_size: int,
        store: TensorStore,
        call: Callable[[Any, Tensor], Any],
    ) -> None:
        self.module, self.batch_size, self.store, self.call = module, batch_size, store, call
        self.count, self.device = len(inputs), inputs.device
        placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        self.values: dict[fx.Node, Tensor] = dict(zip(placeholders, Rows.of(inputs).tensors, strict=True))

    def pieces(self, node: fx.Node, count: int | None = None) -> list[slice]:
        """The first `count` rows, by default all, in portions in which a node's value is computed."""
        size = rows_of_a_pass(pass_bytes(node), self.batch_size, self.store.budget)
        end = self.count if count is None else count
        return [slice(start, min(start + size, end)) for start in range(0, end, size)]

    def value(self, node: fx.Node, rows: slice) -> Any:
        """Value of ``node`` for some rows; what is not kept is recomputed from what is."""
        return self._value(node, rows, {})

    def _value(self, node: fx.Node, rows: slice, memo: dict[fx.Node, Any]) -> Any:
        if node in self.values:
            return self.values[node][rows].to(self.device)
        if node in memo:
            return memo[node]
        if is_batch_size(node):
            return rows.stop - rows.start
        if node.op == "get_attr":
            return getattr(self.module, str(node.target))
        arguments: Any = fx.node.map_arg((node.args, node.kwargs), lambda n: self._value(n, rows, memo))
        target: Any = node.target
        if node.op == "call_module":
            result = self.call(self.module.get_submodule(target), arguments[0][0])
        else:
            result = target(*arguments[0], **arguments[1])
        memo[node] = result
        return result

    def set(self, node: fx.Node, value: Tensor) -> None:
        """Keep a tensor, which may be another node's, as the node's value."""
        self.values[node] = value

    @torch.no_grad()
    def run(self, node: fx.Node, dying: Sequence[fx.Node] = ()) -> None:
        """Compute and keep a node's value for all rows (nothing is kept if its first axis is not the batch).

        Parameters
        ----------
        node : fx.Node
            What to compute.
        dying : sequence of fx.Node
            Nodes whose values nobody needs after this one: the result takes the place of one of them where it fits,
            row by row, so that a chain of activations takes one tensor and not one each.
        """
        if node.op in ("placeholder", "get_attr", "output") or not is_batched(node):
            return
        self.drop([node])
        kept: Tensor | None = None
        for rows in self.pieces(node):
            part = self.value(node, rows)
            if kept is None:
                shape = (self.count, *part.shape[1:])
                place = next((n for n in dying if self._fits(n, node, shape, part.dtype)), None)
                if place is not None:
                    kept = self.values[place]
                else:
                    kept = self.store.allocate(shape, part.dtype, part.device)
            # A view of what dies (a transpose of it, say) is read whole before its place is written.
            shared = part.untyped_storage().data_ptr() == kept.untyped_storage().data_ptr()
            kept[rows] = part.clone() if shared else part
            self.store.settle()
        assert kept is not None
        for other in [n for n, value in self.values.items() if value is kept]:
            del self.values[other]
        self.values[node] = kept

    def _fits(self, place: fx.Node, node: fx.Node, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Whether the value of ``place`` may be overwritten by that of ``node``.

        Rows of one depend on the same rows of the other only, it is no one else's, and it is not the caller's.
        """
        value = self.values.get(place)
        if value is None or place.op == "placeholder" or place not in node.all_input_nodes:
            return False
        owners = [n for n, other in self.values.items() if other is value]
        return owners == [place] and value.shape == shape and value.dtype == dtype

    @torch.no_grad()
    def gathered(self, node: fx.Node) -> Tensor:
        """All of a node's value, as :func:`rows_of` puts it where the first axis is not the batch."""
        if node in self.values:
            return self.values[node]
        return torch.cat([rows_of(node, self.value(node, rows)) for rows in self.pieces(node)])

    def run_stretch(self, nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> None:
        """Compute ``outputs`` anew from what stands before ``nodes``.

        Of what lies between, only what others will read is kept (a quantizer that a shortcut shares with the layer behind
        it, when layers are units).
        """
        inside = set(nodes)
        shared = [n for n in nodes if n in self.values and any(user not in inside for user in n.users)]
        self.drop(nodes)
        for node in [n for n in shared if n not in outputs] + list(outputs):
            self.run(node)

    def drop(self, nodes: Sequence[fx.Node]) -> None:
        """Forget values."""
        for node in nodes:
            value = self.values.pop(node, None)
            if value is not None and not any(value is other for other in self.values.values()):
                self.store.release(value)


def rows_of(node: fx.Node, value: Tensor) -> Tensor:
    """A node's value with rows in front: several for an input where frames of it are, else those of the last axis."""
    shape = node.meta["val"].shape
    if not shape:
        return value.reshape(1, 1)
    if not isinstance(shape[0], int) and all(isinstance(size, int) for size in shape[1:]):
        return value
    return value.reshape(-1, value.shape[-1])


def first_inputs(value: Tensor, count: int, total: int) -> Tensor:
    """What of a gathered value belongs to the first ``count`` of ``total`` inputs: its rows come in their order."""
    return value[: len(value) * count // total]


def last_uses(graph: fx.Graph, extended: Mapping[fx.Node, Iterable[fx.Node]]) -> dict[fx.Node, list[fx.Node]]:
    """Node -> nodes whose kept values nobody needs after it.

    Parameters
    ----------
    graph : fx.Graph
        In order of execution.
    extended : dict
        Node -> others whose values must live until then.
    """
    final: dict[fx.Node, fx.Node] = {}
    behind: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        direct: set[fx.Node] = set() if is_batch_size(node) else set(node.all_input_nodes)
        for source in list(direct):
            direct |= behind.get(source, set())
        if node in extended:
            direct.update(extended[node])
        # a value that is not kept is recomputed by its readers, so what it reads must live as long as it does
        behind[node] = set() if is_batched(node) else direct
        for source in direct:
            final[source] = node
    out: dict[fx.Node, list[fx.Node]] = {}
    for source, node in final.items():
        out.setdefault(node, []).append(source)
    return out
