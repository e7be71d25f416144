"""Packs: blocks that are reconstructed together, chosen by score.

``S = E[2 (L_q - dz' g)] / E[dz' dz]`` for each block, with ``dz`` the change of its output under quantization, ``g`` the
gradient of the task loss there and ``L_q`` the increase of the loss: the curvature of the loss along the quantization
error ("Pack-PTQ", arXiv 2505.00259, equations 7 to 9).  Starting with the whole range, a pack is everything from the
block with the lowest score to the range's end; then the same in front of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from cat_plugin.ptq.graph.units import Unit, whole_model
from cat_plugin.ptq.learned.losses import Tail
from cat_plugin.ptq.learned.quality import Quality
from cat_plugin.ptq.learned.soft_unit import float_call, run_nodes
from cat_plugin.ptq.rows import Rows

__all__ = ["group_by_score", "join_units", "pack_scores"]


@torch.no_grad()
def pack_scores(
    module: fx.GraphModule, units: Sequence[Unit], inputs: Tensor | Rows, quality: Quality | None = None
) -> list[float]:
    """Score of each unit's output.

    Parameters
    ----------
    module : fx.GraphModule
        Prepared graph with every range and integer chosen.
    units : sequence of Unit
        In order; together the whole graph.
    inputs : Tensor or Rows
        (n, ...) some calibration inputs.
    quality : Quality or None
        What counts of the results; None is one (N, C) of logits.

    Returns
    -------
    list of float
        One score a unit; a unit whose output does not change has an infinite one.
    """
    quality = Quality() if quality is None else quality
    given = dict(zip(whole_model(module).sources, Rows.of(inputs).tensors, strict=True))
    full: dict[fx.Node, Any] = dict(given)
    quantized: dict[fx.Node, Any] = dict(given)
    scores = []
    fulls, changes = [], []
    read = {n for unit in units for n in (*unit.sources, *unit.outputs)}
    read.update(quality.nodes(module.graph))
    for unit in units:
        run_nodes(module, unit.nodes, full, float_call)
        run_nodes(module, unit.nodes, quantized, lambda child, x: child(x))
        full, quantized = ({n: v for n, v in env.items() if n in read} for env in (full, quantized))
        fulls.append(Rows([full[n] for n in unit.outputs]))
        changes.append(Rows([quantized[n] - full[n] for n in unit.outputs]))
    likely = quality.likely(Rows([full[n] for n in quality.nodes(module.graph)]))
    for unit, y, dz in zip(units, fulls, changes, strict=True):
        power = float(_per_row([each.square() for each in dz.tensors]).mean())
        tail = Tail(module, unit, quality, given)
        if power <= 0 or not tail.nodes:
            scores.append(float("inf"))
            continue
        gradient = tail.gradient(y, likely)
        moved = Rows([a + b for a, b in zip(y.tensors, dz.tensors, strict=True)])
        increase = tail.losses(moved, likely) - tail.losses(y, likely)
        along = _per_row([a * b for a, b in zip(dz.tensors, gradient.tensors, strict=True)])
        scores.append(float(2.0 * (increase - along).mean()) / power)
    return scores


def _per_row(tensors: Sequence[Tensor]) -> Tensor:
    """(n,) sum over everything in a row."""
    total = tensors[0].flatten(1).sum(1)
    for each in tensors[1:]:
        total = total + each.flatten(1).sum(1)
    return total


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


def _ends(parts: Sequence[Unit]) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]:
    """What a run of units reads from outside and makes for others."""
    inside = {n for part in parts for n in part.nodes}
    sources = dict.fromkeys(n for part in parts for n in part.sources if n not in inside)
    made = [n for part in parts[:-1] for n in part.outputs if any(user not in inside for user in n.users)]
    return tuple(sources), (*dict.fromkeys(made), *parts[-1].outputs)


def join_units(units: Sequence[Unit], ranges: Sequence[tuple[int, int]]) -> list[Unit]:
    """One unit for each range of units."""
    joined = []
    for start, end in ranges:
        parts = units[start:end]
        name = parts[0].name if len(parts) == 1 else f"{parts[0].name}..{parts[-1].name}"
        joined.append(
            Unit(
                name,
                *_ends(parts),
                [n for part in parts for n in part.nodes],
                [layer for part in parts for layer in part.layers],
                [q for part in parts for q in part.quantizers],
            )
        )
    return joined
