"""Whether the graph that is handed over computes what the calibrated one does, node by node.

Compared as wholes the two say little: where a value lies on the edge between two levels the last bit of a sum decides, and in
a deep network of few bits one such value moves every output.  Here each node is given the values of the calibrated graph, so
that nothing adds up and no fault hides behind another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from cat_plugin.equivalence import TOLERANCE, distance
from cat_plugin.errors import QuantizationError
from cat_plugin.models import full_float32
from cat_plugin.ptq.quantizers.uniform import ActQuantizer
from cat_plugin.structures import leaves_of

__all__ = ["check_lowered"]

#: Share of a quantizer's values that may lie on an edge between two levels.
_ON_EDGES = 0.01


def check_lowered(
    prepared: fx.GraphModule,
    lowered: fx.GraphModule,
    counterparts: Mapping[str, str],
    tensors: Sequence[Tensor],
) -> None:
    """Compare every node of a lowered graph with its counterpart, given the counterpart's inputs.

    Parameters
    ----------
    prepared : fx.GraphModule
        Calibrated, with quantizers as modules.
    lowered : fx.GraphModule
        From :func:`cat_plugin.ptq.graph.lower.lower`, on the same device.
    counterparts : mapping of str to str
        From there.
    tensors : sequence of Tensor
        Inputs of `prepared`, of a few rows.

    Raises
    ------
    QuantizationError
        If a node, or what is returned, differs by more than rounding.
    """
    quantizers = {name for name, child in prepared.named_modules() if isinstance(child, ActQuantizer)}
    with torch.no_grad(), full_float32():
        theirs = _steps(prepared, tensors)
        for node, found in _steps(lowered, ()):
            name = counterparts.get(node.name)
            if name is None:
                continue
            source, expected = next(step for step in theirs if step[0].name == name)
            given, wanted = found[node], expected[source]
            found[node] = wanted
            on_edges = source.op == "call_module" and source.target in quantizers
            apart = 0.0 if node.op == "placeholder" else _distance(given, wanted, on_edges)
            if apart > TOLERANCE:
                raise QuantizationError(
                    f"lowered, {source.name!r} is {apart:.2g} of its largest value away from what was calibrated; expected less "
                    f"than {TOLERANCE:g}. This is a fault of this package, not of the model: please report it with the model's "
                    "code."
                )
    returned = [
        [getattr(leaf, "name", leaf) for leaf in leaves_of(module.graph.output_node().args[0])]
        for module in (prepared, lowered)
    ]
    if [counterparts.get(name, name) for name in returned[1]] != returned[0]:
        raise QuantizationError(
            f"lowered, the graph returns {returned[1]}; expected {returned[0]}. This is a fault of this package, not of the "
            "model: please report it with the model's code."
        )


def _steps(module: fx.GraphModule, tensors: Sequence[Tensor]) -> Iterator[tuple[fx.Node, dict[fx.Node, Any]]]:
    """Run a graph; after each node, the node and the values that are still needed, which may be replaced."""
    interpreter, given = fx.Interpreter(module), iter(tensors)
    values = interpreter.env
    for node in module.graph.nodes:
        if node.op == "output":
            return
        values[node] = next(given, None) if node.op == "placeholder" else interpreter.run_node(node)
        yield node, values
        for last in interpreter.user_to_last_uses.get(node, ()):
            del values[last]


def _distance(found: Any, expected: Any, quantized: bool) -> float:
    """Largest difference; where levels are chosen, but for the few values that may lie on an edge between two."""
    if isinstance(found, tuple | list):
        return max((_distance(*pair, quantized) for pair in zip(found, expected, strict=True)), default=0.0)
    if not quantized or found.shape != expected.shape:
        return distance(found, expected)
    off = (found - expected).abs() > TOLERANCE * expected.abs().max()
    if int(off.sum()) > max(1, _ON_EDGES * off.numel()):
        return distance(found, expected)
    return distance(torch.where(off, expected, found), expected)
