"""Cross-layer equalization where it is exact.

For two layers with only ReLU or nothing between them, ``W2 f(W1 x + b1) = (W2 S) f(S^-1 W1 x + S^-1 b1)`` for every
positive diagonal ``S``; ``s_i = sqrt(r1_i / r2_i)``, with ``r1_i`` the range of output channel i of the first layer and
``r2_i`` that of input channel i of the second, gives both the same range (Nagel et al., "Data-Free Quantization Through
Weight Equalization and Bias Correction", arXiv 1906.04721, equations 7 and 11).  ReLU6 and other activations do not
commute with ``S`` and are left alone.  With per-channel weights the gain is in the per-tensor activation between.
Default: off; on for models whose channels differ widely (depthwise convolutions).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from cat_plugin.ptq.ops import WEIGHTED, is_call

__all__ = ["equalize"]

_aten = torch.ops.aten


def _groups(node: Any) -> int:
    return int(node.args[6]) if len(node.args) > 6 else 1


def _follower(node: Any) -> Any:
    """The layer that alone reads ``node``, with at most a ReLU between; None if there is none."""
    while True:
        if len(node.users) != 1:
            return None
        (user,) = node.users
        if is_call(user, {_aten.relu.default}):
            node = user
        elif is_call(user, WEIGHTED) and user.args[0] is node and user.args[1].op == "get_attr":
            return user
        else:
            return None


@torch.no_grad()
def equalize(module: fx.GraphModule, rounds: int = 3) -> int:
    """Equalize every pair for which it is exact, in place.

    Parameters
    ----------
    module : fx.GraphModule
        BatchNorm-folded ATen graph.
    rounds : int
        Passes over the pairs; chains need several to settle.

    Returns
    -------
    int
        Number of pairs.
    """
    pairs = []
    uses: dict[str, int] = {}
    for node in module.graph.nodes:
        if is_call(node, WEIGHTED) and node.args[1].op == "get_attr":
            uses[node.args[1].target] = uses.get(node.args[1].target, 0) + 1
    for node in module.graph.nodes:
        if not is_call(node, WEIGHTED) or node.args[1].op != "get_attr":
            continue
        after = _follower(node)
        if after is None or uses[node.args[1].target] > 1 or uses[after.args[1].target] > 1:
            continue
        width = getattr(module, node.args[1].target).shape[0]
        second = getattr(module, after.args[1].target)
        depthwise = _groups(after) == width == second.shape[0]
        if depthwise or (_groups(after) == 1 and second.shape[1] == width):
            pairs.append((node, after, depthwise))
    for _ in range(rounds):
        for node, after, depthwise in pairs:
            first, second = getattr(module, node.args[1].target), getattr(module, after.args[1].target)
            r1 = first.abs().flatten(1).amax(1)
            r2 = (second if depthwise else second.transpose(0, 1)).abs().flatten(1).amax(1)
            usable = (r1 > 1e-8) & (r2 > 1e-8)  # a dead channel stays as it is
            s = torch.where(usable, (r1 / r2.clamp(min=1e-8)).sqrt(), torch.ones_like(r1)).clamp(1e-3, 1e3)
            first /= s.reshape(-1, *[1] * (first.ndim - 1))
            if len(node.args) > 2 and node.args[2] is not None:
                getattr(module, node.args[2].target).div_(s)
            shape = [-1, *[1] * (second.ndim - 1)] if depthwise else [1, -1, *[1] * (second.ndim - 2)]
            second *= s.reshape(shape)
    return len(pairs)
