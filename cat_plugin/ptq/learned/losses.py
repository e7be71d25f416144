"""What a change of a block's output does to the prediction: gradients and losses of the full-precision network.

The task loss is the cross entropy against the full-precision network's own most likely class, since labels are not
given; for what is no logits, the squared error against the full-precision network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx

from cat_plugin.ptq.graph.units import Unit
from cat_plugin.ptq.learned.quality import Quality
from cat_plugin.ptq.learned.soft_unit import float_call, run_nodes
from cat_plugin.ptq.rows import Rows

__all__ = ["Tail", "curvature_directions", "curvature_weights", "fisher_weights", "prediction_difference"]

_CURVED = 256  # calibration rows, the first ones, that curvature is averaged over


class Tail:
    """The full-precision network behind a unit.

    Parameters
    ----------
    module : fx.GraphModule
        The prepared graph.
    unit : Unit
        In front of it.
    quality : Quality
        What counts of the results.
    given : mapping of fx.Node to Tensor
        Values of the model's inputs, which what stands behind the unit may read as well.

    Attributes
    ----------
    nodes : list of fx.Node
        What stands behind the unit, and leads to what counts.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        unit: Unit,
        quality: Quality,
        given: Mapping[fx.Node, Tensor] | None = None,
    ) -> None:
        self.module, self.unit, self.quality, self.given = module, unit, quality, given or {}
        order = [n for n in module.graph.nodes if n.op not in ("get_attr", "output", "placeholder")]
        self.nodes = order[order.index(unit.output) + 1 :]
        self.results = quality.nodes(module.graph)

    def __getitem__(self, rows: slice | Tensor) -> Tail:
        """The same for some rows of the model's inputs."""
        given = {n: x[rows if isinstance(rows, slice) else rows.to(x.device)] for n, x in self.given.items()}
        return Tail(self.module, self.unit, self.quality, given)

    def __call__(self, y: Rows) -> Rows:
        """What counts of the results when the unit's outputs are ``y``."""
        values = dict(zip(self.unit.outputs, y.tensors, strict=True))
        env = {**values, **{n: x.to(y.device) for n, x in self.given.items()}}
        run_nodes(self.module, self.nodes, env, float_call)
        missing = [n for n in self.results if n not in env]
        run_nodes(self.module, missing, env, float_call)  # results that were there before the unit
        return Rows([env[n] for n in self.results])

    def losses(self, y: Rows, likely: Sequence[Tensor]) -> Tensor:
        """(n,) task loss of each row when the unit's outputs are ``y`` and everything behind is full precision."""
        return self.quality.task_losses(self(y), likely)

    def gradient(self, y: Rows, likely: Sequence[Tensor], generator: torch.Generator | None = None) -> Rows:
        """Gradient of each row's task loss for the unit's outputs; of the shapes of ``y``.

        With a generator, that of :meth:`~cat_plugin.ptq.learned.quality.Quality.probe`.
        """
        with torch.enable_grad():
            leaves = Rows([x.detach().clone().requires_grad_() for x in y.tensors])
            if generator is None:
                total = self.losses(leaves, likely).sum()
            else:
                total = self.quality.probe(self(leaves), likely, generator).sum()
            found = torch.autograd.grad(total, leaves.tensors, allow_unused=True)
        return Rows([torch.zeros_like(x) if g is None else g for g, x in zip(found, y.tensors, strict=True)])


def fisher_weights(tail: Tail, targets: Rows, batch_size: int) -> Rows:
    """Diagonal of the empirical Fisher information of the unit's outputs, one value an element.

    Squared gradients of the task loss, averaged over the calibration rows and scaled to mean 1 (BRECQ, arXiv
    2102.05426, equation 10).

    Returns
    -------
    Rows
        (1, ...) of the shapes of one row's outputs.
    """
    generator = torch.Generator().manual_seed(0)
    totals = [torch.zeros_like(x[:1]) for x in targets.tensors]
    for start in range(0, len(targets), batch_size):
        rows = slice(start, start + batch_size)
        y, part = targets[rows], tail[rows]
        with torch.no_grad():
            likely = tail.quality.likely(part(y))
        for total, gradient in zip(totals, part.gradient(y, likely, generator).tensors, strict=True):
            total += gradient.square().sum(0, keepdim=True)
    return _relative(totals)


def _relative(totals: Sequence[Tensor]) -> Rows:
    """Weights with the mean 1; where nothing behind reads an element, it must still not be free to run away."""
    return Rows(
        [(x / mean).clamp(min=0.01) if float(mean := x.mean()) > 0 else torch.ones_like(x) for x in totals]
    )


def curvature_weights(tail: Tail, targets: Rows, batch_size: int, temperature: float) -> Rows:
    """Diagonal of the curvature of the results' divergence for the unit's outputs, one value an element.

    Squared gradients of :meth:`~cat_plugin.ptq.learned.quality.Quality.curvature_probe`, those of each row over their mean
    before rows are averaged, so that a row of which the network is sure counts as much as any other (the diagonal of FIMA-Q,
    arXiv 2506.11543, section 3).

    Returns
    -------
    Rows
        (1, ...) of the shapes of one row's outputs, of mean 1.
    """
    generator = torch.Generator().manual_seed(0)
    totals = [torch.zeros_like(x[:1]) for x in targets.tensors]
    for start in range(0, min(len(targets), _CURVED), batch_size):
        rows = slice(start, min(start + batch_size, _CURVED, len(targets)))
        (probe,) = _probes(tail[rows], targets[rows], temperature, generator, 1)
        squares = [x.square() for x in probe]
        power = sum(x.flatten(1).sum(1) for x in squares)
        assert isinstance(power, Tensor)
        for total, square in zip(totals, squares, strict=True):
            each = power.clamp(min=1e-30).reshape(-1, *[1] * (square.ndim - 1))
            total += (square / each).sum(0, keepdim=True)
    return _relative(totals)


def _probes(
    part: Tail, targets: Rows, temperature: float, generator: torch.Generator, count: int
) -> list[list[Tensor]]:
    """Gradients of so many :meth:`~cat_plugin.ptq.learned.quality.Quality.curvature_probe` for a unit's outputs."""
    with torch.enable_grad():
        leaves = [x.detach().clone().requires_grad_() for x in targets.tensors]
        results, found = part(Rows(leaves)), []
        for left in reversed(range(count)):
            total = part.quality.curvature_probe(results, temperature, generator)
            found.append(torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=left > 0))
    return [
        [torch.zeros_like(x) if g is None else g for g, x in zip(each, leaves, strict=True)] for each in found
    ]


def curvature_directions(
    tail: Tail, targets: Rows, batch_size: int, temperature: float, rank: int = 2
) -> Callable[[Rows, Tensor], Tensor]:
    """The curvature of the results' divergence along a few directions for each input: what its diagonal does not say.

    With ``g_1 .. g_R`` the gradients of random probes of an input, whose mean of ``g g'`` is the curvature, and ``e`` the change of
    the unit's outputs: ``sum_r (g_r' e)^2 / sum_r |g_r|^2``, over the mean square of the outputs.  Beside the weights of
    :func:`curvature_weights` this is a Fisher information of a diagonal plus a low rank, as FIMA-Q has it (arXiv 2506.11543,
    section 3.3), with directions for each input instead of some for all.

    Returns
    -------
    callable
        (outputs of the unit, row numbers) -> loss.
    """
    generator = torch.Generator().manual_seed(1)
    found: list[list[Tensor]] = [[] for _ in targets.tensors]
    for start in range(0, len(targets), batch_size):
        rows = slice(start, start + batch_size)
        probes = _probes(tail[rows], targets[rows], temperature, generator, rank)
        directions = [torch.stack(each, 1).flatten(2) for each in zip(*probes, strict=True)]
        power = torch.stack([x.square().sum((1, 2)) for x in directions]).sum(0).clamp(min=1e-30)
        for kept, each in zip(found, directions, strict=True):
            kept.append(each / power.sqrt().reshape(-1, 1, 1))
    along = Rows([torch.cat(kept) for kept in found])
    square = sum(float(x.square().sum(dtype=torch.float64)) for x in targets.tensors)
    scale = max(square / sum(x.numel() for x in targets.tensors), 1e-20)

    def loss(y: Rows, rows: Tensor) -> Tensor:
        wanted, some = targets[rows].to(y.device), along[rows].to(y.device)
        moved = [
            torch.einsum("nrk,nk->nr", d, (mine - other).flatten(1))
            for d, mine, other in zip(some.tensors, y.tensors, wanted.tensors, strict=True)
        ]
        return torch.stack(moved).sum(0).square().sum(1).mean() / scale

    return loss


def prediction_difference(
    tail: Tail, targets: Rows, weight: float, temperature: float
) -> Callable[[Rows, Tensor], Tensor] | None:
    """PD-Quant's guidance: how far a unit's quantized outputs move the prediction of the network behind it.

    ``weight * KL(f(y) || f(y_q))`` with ``f`` the full-precision rest of the network (Liu et al., "PD-Quant", arXiv
    2212.07048, equation 5).  A step then costs a pass through the rest of the network.  Default: weight 0, because
    the whole-model stage sees the same loss with everything quantized at the same price a step.

    Returns
    -------
    callable or None
        (outputs of the unit, row numbers) -> loss; None when the weight is 0 or nothing follows the unit.
    """
    if weight <= 0 or not tail.nodes:
        return None

    def loss(y: Rows, rows: Tensor) -> Tensor:
        part = tail[rows]
        with torch.no_grad():
            reference = part(targets[rows].to(y.device))
        return weight * tail.quality.error(part(y), reference, temperature)

    return loss
