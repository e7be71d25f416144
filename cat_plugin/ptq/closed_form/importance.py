"""How much each position (token) of a linear layer's output matters to the results.

Behind the last block of a vision transformer only the class token is read; in a padded sentence only some tokens are tokens.
A closed form that fits a layer to all positions alike spends itself on what nobody reads.  The second-order change of the
results' error under a change ``d`` of a layer's output is ``d' J' F J d`` with ``J`` the Jacobian of the results and ``F``
their Fisher information; of it the diagonal is taken (as in BRECQ, arXiv 2102.05426, equation 10, and FIMA-Q, arXiv
2506.11543), summed over the channels of a position: the mean of ``(J' r)^2`` over random ``r`` with covariance ``F``.  Each
input counts the same: its positions' weights have the mean 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from cat_plugin.ptq.graph.modules import QuantOp
from cat_plugin.ptq.graph.ops import is_batched
from cat_plugin.ptq.graph.units import whole_model
from cat_plugin.ptq.learned.precision import compute_in_bf16
from cat_plugin.ptq.learned.quality import Quality
from cat_plugin.ptq.learned.soft_unit import float_call, run_nodes
from cat_plugin.ptq.rows import Rows

__all__ = ["importance_of_positions", "layers_with_positions"]

_PROBES = 2
_FLOOR = 0.1  # share of a weight that all positions have alike, so that covariances keep their rank


def layers_with_positions(module: fx.GraphModule) -> list[fx.Node]:
    """Linear layers whose outputs are (N, positions..., C)."""
    found = []
    for node in module.graph.nodes:
        child = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        linear = isinstance(child, QuantOp) and child.kind == "linear"
        if linear and is_batched(node) and node.meta["val"].ndim > 2:
            found.append(node)
    return found


@torch.enable_grad()
def importance_of_positions(
    module: fx.GraphModule,
    inputs: Rows,
    quality: Quality,
    batch_size: int,
    generator: torch.Generator,
    temperature: float = 2.0,
    bf16: bool = False,
) -> dict[fx.Node, Tensor]:
    """Weight of every position of the layers that have positions.

    Parameters
    ----------
    module : fx.GraphModule
        Prepared graph; computed in full precision.
    inputs : Rows
        (N, ...) calibration inputs; of several processes this one's share, and so are the weights.
    quality : Quality
        What counts of the results.
    batch_size : int
        Rows in one pass.
    generator : torch.Generator
        CPU generator of the probes.
    temperature : float
        Of the softmax whose Fisher information it is.
    bf16 : bool
        Dense layers in BF16, see :mod:`~cat_plugin.ptq.learned.precision`: weights want no more digits.

    Returns
    -------
    dict of fx.Node to Tensor
        (N, positions) float32 weights, at least a tenth and 1 in the mean over the positions of an input.
    """
    layers = layers_with_positions(module)
    if not layers:
        return {}
    whole = whole_model(module, quality.nodes(module.graph))
    parts: dict[fx.Node, list[Tensor]] = {node: [] for node in layers}
    others = inputs.ranks.extent(len(inputs)).others(batch_size)
    for start in range(0, len(inputs), batch_size):
        batch = inputs[start : start + batch_size]
        env: dict[fx.Node, Any] = dict(zip(whole.sources, batch.tensors, strict=True))
        run_nodes(module, whole.nodes, env, partial(_with_gradients, bf16=bf16))
        results = Rows([env[node] for node in whole.outputs])
        if start == 0:
            _pass_over(generator, others[0], results)
        outputs = [env[node] for node in layers]
        power = [torch.zeros(len(batch), x[0].numel() // x.shape[-1], device=x.device) for x in outputs]
        for probe in range(_PROBES):
            total = quality.curvature_probe(results, temperature, generator)
            last = probe == _PROBES - 1
            gradients = torch.autograd.grad(total, outputs, allow_unused=True, retain_graph=not last)
            for sums, gradient in zip(power, gradients, strict=True):
                if gradient is not None:
                    sums += gradient.square().sum(-1).flatten(1)
        for node, sums in zip(layers, power, strict=True):
            parts[node].append(_normalised(sums))
    return {node: torch.cat(some) for node, some in parts.items()}


def _pass_over(generator: torch.Generator, batches: Sequence[int], results: Rows) -> None:
    """Draw what other processes draw for batches of so many rows before this one's first."""
    for rows in batches:
        for _ in range(_PROBES):
            for result in results.tensors:
                torch.randint(2, (rows, *result.shape[1:]), generator=generator)


def _with_gradients(child: Any, value: Tensor, bf16: bool) -> Any:
    """Full precision, with gradients from the first layers on."""
    if not isinstance(child, QuantOp):
        return float_call(child, value)
    compute = compute_in_bf16 if bf16 else QuantOp.compute
    result = compute(child, value, child.float_weight, child.float_bias)
    return result if result.requires_grad else result.detach().requires_grad_()


def _normalised(power: Tensor) -> Tensor:
    """(n, positions) with the floor and the mean 1; a row without any power has equal weights."""
    mean = power.mean(1, keepdim=True)
    relative = torch.where(mean > 0, power / mean.clamp(min=1e-30), 1.0)
    return _FLOOR + (1 - _FLOOR) * relative
