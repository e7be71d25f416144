"""Weight bit-widths under a size budget, by dynamic programming.

Each unit (block or pack) is quantized alone at every candidate width, and the divergence of the logits it causes is its
cost there; the widths that minimise the summed cost within the budget are found exactly by dynamic programming over
the size (a multiple-choice knapsack; the search of Pack-PTQ, arXiv 2505.00259, section 3.3, with the measured
divergence as the quality).  Default: off; every layer has ``w_bits``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from cat_plugin.errors import CATValueError
from cat_plugin.ptq.graph.modules import QuantOp
from cat_plugin.ptq.graph.units import Unit, whole_model
from cat_plugin.ptq.learned.quality import Quality
from cat_plugin.ptq.learned.soft_unit import run_float_rows, run_nodes
from cat_plugin.ptq.quantizers.observers import search_weight_range
from cat_plugin.ptq.rows import Rows

__all__ = ["choose_bits", "unit_costs"]

_CELLS = 4000


def choose_bits(
    costs: Sequence[Sequence[float]], sizes: Sequence[int], candidates: Sequence[int], budget: float
) -> list[int]:
    """The widths of least total cost whose mean, weighted by size, is within the budget.

    Parameters
    ----------
    costs : sequence of sequence of float
        ``costs[i][j]`` of unit i at ``candidates[j]`` bits.
    sizes : sequence of int
        Weights in each unit.
    candidates : sequence of int
        Bit-widths, ascending.
    budget : float
        Mean bits a weight at most.

    Returns
    -------
    list of int
        Bits of each unit.

    Raises
    ------
    CATValueError
        If even the smallest width is above the budget.
    """
    total = sum(sizes)
    if not candidates or candidates[0] > budget:
        raise CATValueError(
            f"the weight budget is {budget} bits on average, the smallest candidate {list(candidates)[:1]}; allow "
            "fewer bits or raise the budget."
        )
    # sizes in units of the step above the smallest width; rounding up keeps the budget
    room = (budget - candidates[0]) * total
    cell = max(room / _CELLS, 1.0)
    cells = int(room / cell + 1e-9)
    infinite = float("inf")
    best = [0.0] + [infinite] * cells
    picks: list[list[int]] = []
    for unit, size in zip(costs, sizes, strict=True):
        extra = [-int(-((bits - candidates[0]) * size) // cell) for bits in candidates]
        table, pick = [infinite] * (cells + 1), [-1] * (cells + 1)
        for used, cost in enumerate(best):
            if cost == infinite:
                continue
            for j, more in enumerate(extra):
                if used + more <= cells and cost + unit[j] < table[used + more]:
                    table[used + more], pick[used + more] = cost + unit[j], j
        best = table
        picks.append([pick[i] for i in range(cells + 1)])
    used = min(range(cells + 1), key=lambda i: best[i])
    chosen: list[int] = []
    for unit_index in reversed(range(len(costs))):
        j = picks[unit_index][used]
        chosen.append(candidates[j])
        used -= -int(-((candidates[j] - candidates[0]) * sizes[unit_index]) // cell)
    return chosen[::-1]


@torch.no_grad()
def unit_costs(
    module: fx.GraphModule,
    units: Sequence[Unit],
    inputs: Tensor | Rows,
    candidates: Sequence[int],
    symmetric: bool,
    quality: Quality | None = None,
) -> list[list[float]]:
    """Divergence of the logits when only one unit's weights are quantized, at each width.

    Parameters
    ----------
    module : fx.GraphModule
        Prepared graph; weights are used in float.
    units : sequence of Unit
        Units to measure.
    inputs : Tensor or Rows
        (n, ...) some calibration inputs.
    candidates : sequence of int
        Bit-widths.
    symmetric : bool
        As in the specification.
    quality : Quality or None
        What counts of the results; None is one (N, C) of logits.

    Returns
    -------
    list of list of float
        ``[unit][candidate]``.
    """
    quality = Quality() if quality is None else quality
    results = quality.nodes(module.graph)
    whole = whole_model(module, results)
    given = dict(zip(whole.sources, Rows.of(inputs).tensors, strict=True))
    reference = run_float_rows(module, whole.nodes, given, results)
    costs = []
    for unit in units:
        row = []
        for bits in candidates:
            replaced: dict[object, Tensor] = {}
            for layer in unit.layers:
                scale, zero = search_weight_range(
                    layer.float_weight, bits, symmetric or bits == 8, layer.group
                )
                s, z = layer.per_channel(scale), layer.per_channel(zero).float()
                low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
                replaced[layer] = ((layer.float_weight / s + z).round().clamp(low, high) - z) * s

            def call(child: Any, x: Tensor, replaced: dict[object, Tensor] = replaced) -> Any:
                if not isinstance(child, QuantOp):
                    return x
                return child.compute(x, replaced.get(child, child.float_weight), child.float_bias)

            env: dict[fx.Node, Any] = dict(given)
            run_nodes(module, whole.nodes, env, call)
            row.append(float(quality.error(Rows([env[n] for n in results]), reference, 1.0)))
        costs.append(row)
    return costs
