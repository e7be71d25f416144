"""Packs: blocks that are reconstructed together, chosen by score.

``S = E[2 (L_q - dz' g)] / E[dz' dz]`` for each block, with ``dz`` the change of its output under quantization, ``g`` the
gradient of the task loss there and ``L_q`` the increase of the loss: the curvature of the loss along the quantization
error ("Pack-PTQ", arXiv 2505.00259, equations 7 to 9).  Starting with the whole range, a pack is everything from the
block with the lowest score to the range's end; then the same in front of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from cat_plugin.ptq.graph.units import Unit
from cat_plugin.ptq.learned.losses import loss_gradient, nodes_after, tail_losses
from cat_plugin.ptq.learned.soft_unit import run_float, run_nodes

__all__ = ["group_by_score", "join_units", "pack_scores"]


@torch.no_grad()
def pack_scores(module: fx.GraphModule, units: Sequence[Unit], inputs: Tensor) -> list[float]:
    """Score of each unit's output.

    Parameters
    ----------
    module : fx.GraphModule
        Prepared graph with every range and integer chosen.
    units : sequence of Unit
        In order; together the whole graph.
    inputs : Tensor
        (n, ...) some calibration inputs.

    Returns
    -------
    list of float
        One score a unit; a unit whose output does not change has an infinite one.
    """
    full, quantized = inputs, inputs
    scores = []
    fulls, changes = [], []
    for unit in units:
        full = run_float(module, unit.nodes, unit.source, full, unit.output)
        env = {unit.source: quantized}
        run_nodes(module, unit.nodes, env, lambda child, x: child(x))
        quantized = env[unit.output]
        fulls.append(full)
        changes.append(quantized - full)
    classes = full.argmax(1)
    for unit, y, dz in zip(units, fulls, changes, strict=True):
        power = float(dz.square().flatten(1).sum(1).mean())
        if power <= 0 or not nodes_after(module, unit)[0]:
            scores.append(float("inf"))
            continue
        gradient = loss_gradient(module, unit, y, classes)
        increase = tail_losses(module, unit, y + dz, classes) - tail_losses(module, unit, y, classes)
        along = (dz * gradient).flatten(1).sum(1)
        scores.append(float(2.0 * (increase - along).mean()) / power)
    return scores


def group_by_score(scores: Sequence[float]) -> list[tuple[int, int]]:
    """Ranges of blocks that are packs.

    Parameters
    ----------
    scores : sequence of float
        One for each block, in order.

    Returns
    -------
    list of tuple of int
        Half-open ranges, in order, covering all blocks.

    Examples
    --------
    >>> group_by_score([3.0, 1.0, 2.0, 0.5, 4.0])
    [(0, 1), (1, 3), (3, 5)]
    """
    packs: list[tuple[int, int]] = []
    end = len(scores)
    while end > 0:
        start = min(range(end), key=lambda i: scores[i])
        packs.append((start, end))
        end = start
    return packs[::-1]


def join_units(units: Sequence[Unit], ranges: Sequence[tuple[int, int]]) -> list[Unit]:
    """One unit for each range of units."""
    joined = []
    for start, end in ranges:
        parts = units[start:end]
        name = parts[0].name if len(parts) == 1 else f"{parts[0].name}..{parts[-1].name}"
        joined.append(
            Unit(
                name,
                parts[0].source,
                parts[-1].output,
                [n for part in parts for n in part.nodes],
                [layer for part in parts for layer in part.layers],
                [q for part in parts for q in part.quantizers],
            )
        )
    return joined
