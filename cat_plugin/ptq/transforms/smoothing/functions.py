"""A factor and a shift for each channel behind functions that do not commute with them, such as GELU.

What such a function gives is computed in float and rounded right behind; ``a x + b`` for each channel before the rounding is
one multiplication and addition more in the same kernel, and lets these channels be scaled like those of a norm.
"""

from __future__ import annotations

import torch
from torch import fx

from cat_plugin.ptq.graph.ops import ACTIVATIONS, constant, is_call, operand

__all__ = ["insert_factors"]

_aten = torch.ops.aten
_HOMOGENEOUS = frozenset({_aten.relu.default, _aten.leaky_relu.default})


def insert_factors(module: fx.GraphModule) -> int:
    """Write ``0 + x * 1`` behind every function whose last axis linear layers alone read, in place.

    Functions that commute with a scale, such as ReLU, need none.

    Parameters
    ----------
    module : fx.GraphModule
        BatchNorm-folded ATen graph.

    Returns
    -------
    int
        Number of functions.
    """
    graph = module.graph
    inserted = 0
    for node in list(graph.nodes):
        if not is_call(node, ACTIVATIONS - _HOMOGENEOUS) or not node.users:
            continue
        if not all(
            is_call(user, {_aten.linear.default})
            and operand(user) is node
            and constant(module, user.args[1]) is not None
            for user in node.users
        ):
            continue
        value = node.meta["val"]
        device = next((tensor.device for tensor in module.buffers()), torch.device("cpu"))
        names = []
        for name, start in ((f"_shift_{node.name}", torch.zeros), (f"_factor_{node.name}", torch.ones)):
            module.register_buffer(name, start(value.shape[-1], dtype=value.dtype, device=device))
            names.append(name)
        with graph.inserting_after(node):
            new = graph.call_function(_aten.addcmul.default)
        with graph.inserting_before(new):
            shift, factor = (graph.get_attr(name) for name in names)
        node.replace_all_uses_with(new)
        new.args = (shift, node, factor)
        new.meta = dict(node.meta)
        inserted += 1
    module.recompile()
    return inserted
