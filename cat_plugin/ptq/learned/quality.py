"""What of a model's result counts, and how far two results are apart: the one measure that everything with an eye on them has.

Logits are compared by the divergence of their softmax, at every place that has a class axis (images, pixels, tokens); all
other results by the squared error over the power of the full-precision ones.  Several results add up.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from cat_plugin.errors import QuantizationError
from cat_plugin.expectations import nearest
from cat_plugin.ptq.graph.interface import Interface
from cat_plugin.ptq.graph.ops import is_batched, output_leaves
from cat_plugin.ptq.rows import Rows

__all__ = ["Quality", "divergence"]


def divergence(z_q: Tensor, z_fp: Tensor, temperature: float) -> Tensor:
    """Mean over rows of ``T^2 KL(softmax(z_fp / T) || softmax(z_q / T))``; logits (N, C)."""
    log_q = F.log_softmax(z_q / temperature, 1)
    log_p = F.log_softmax(z_fp / temperature, 1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * temperature**2


@dataclass(frozen=True)
class Quality:
    """Which results of a graph count, and as what.

    Attributes
    ----------
    leaves : tuple of int
        Places among the leaves of the result.
    class_axes : tuple of int or None
        For each of these, its class axis if it is logits, None if it is not.
    """

    leaves: tuple[int, ...] = (0,)
    class_axes: tuple[int | None, ...] = (1,)

    @classmethod
    def of(
        cls, graph: fx.Graph, outputs: Sequence[str] = (), logits: str | None = None, class_axis: int = 1
    ) -> Quality:
        """What a specification asks for.

        Parameters
        ----------
        graph : fx.Graph
            Of a traced model.
        outputs : sequence of str
            Name patterns of the results that count; none is all.
        logits : str or None
            Name of the result that is logits; None is a single result (N, C), and else nothing.
        class_axis : int
            Its axis of classes.

        Raises
        ------
        QuantizationError
            If a pattern matches no result, or the class axis is none of the logits' axes.
        """
        owner = graph.owning_module
        interface = owner.meta.get("interface") if owner is not None else None
        found = output_leaves(graph)
        names = list(interface.outputs) if isinstance(interface, Interface) else [""] * len(found)
        real = {
            names[place]: place
            for place, leaf in enumerate(found)
            if isinstance(leaf, fx.Node) and is_batched(leaf) and leaf.meta["val"].is_floating_point()
        }
        for pattern in (*outputs, *([] if logits is None else [logits])):
            if not any(fnmatch.fnmatchcase(name, pattern) for name in real):
                raise QuantizationError(
                    f"the model has no output {pattern!r} of real numbers with a row for each input; "
                    f"{nearest(pattern, list(real))}"
                )
        chosen = [
            name
            for name in real
            if not outputs or name == logits or any(fnmatch.fnmatchcase(name, pattern) for pattern in outputs)
        ]
        axes = []
        for name in chosen:
            value = found[real[name]].meta["val"]
            alone = logits is None and len(found) == 1 and value.ndim == 2
            if name == logits and not (-value.ndim < class_axis < value.ndim and class_axis % value.ndim):
                raise QuantizationError(
                    f"class_axis={class_axis} is no axis of classes of the output {name!r} with {value.ndim} axes, of "
                    f"which the first is the batch; expected one from 1 to {value.ndim - 1}."
                )
            axes.append(1 if alone else class_axis % value.ndim if name == logits else None)
        return cls(tuple(real[name] for name in chosen), tuple(axes))

    def nodes(self, graph: fx.Graph) -> list[fx.Node]:
        """The nodes that hold what counts."""
        leaves = output_leaves(graph)
        return [leaves[place] for place in self.leaves]

    def error(self, found: Rows, wanted: Rows, temperature: float) -> Tensor:
        """() how far results are from those of full precision, aligned with :attr:`leaves`; the latter may be kept elsewhere."""
        total: Tensor | None = None
        wanted = wanted.to(found.device)
        for mine, other, axis in zip(found.tensors, wanted.tensors, self.class_axes, strict=True):
            if axis is None:
                part = (mine - other).square().mean() / other.square().mean().clamp_min(1e-20)
            else:
                part = divergence(_rows(mine, axis), _rows(other, axis), temperature)
            total = part if total is None else total + part
        assert total is not None
        return total

    def changed(self, found: Rows, wanted: Rows) -> tuple[int, int]:
        """At how many places with logits the likeliest class is another, and how many such places there are."""
        others = places = 0
        for mine, other, axis in zip(found.tensors, wanted.tensors, self.class_axes, strict=True):
            if axis is not None:
                different = _rows(mine, axis).argmax(1) != _rows(other, axis).argmax(1)
                others, places = others + int(different.sum()), places + len(different)
        return others, places

    def likely(self, wanted: Rows) -> list[Tensor]:
        """What a task loss compares results with: the likeliest classes, and what is no logits as it is."""
        return [
            x if axis is None else _rows(x, axis).argmax(1)
            for x, axis in zip(wanted.tensors, self.class_axes, strict=True)
        ]

    def task_losses(self, found: Rows, likely: Sequence[Tensor]) -> Tensor:
        """(n,) cross entropy against the likeliest classes, plus the relative squared error of what is no logits."""
        total: Tensor | None = None
        for mine, target, axis in zip(found.tensors, likely, self.class_axes, strict=True):
            if axis is None:
                power = target.square().mean().clamp_min(1e-20)
                part = (mine - target).square().flatten(1).mean(1) / power
            else:
                part = F.cross_entropy(_rows(mine, axis), target, reduction="none")
                part = part if mine.ndim == 2 else part.reshape(len(mine), -1).mean(1)
            total = part if total is None else total + part
        assert total is not None
        return total

    def probe(self, found: Rows, likely: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        """(n,) the task losses with, in the place of a squared error, a projection on random signs.

        A squared error has no gradient at the values of full precision; the squared gradient of the projection has the
        diagonal of its curvature as its mean.
        """
        total: Tensor | None = None
        for mine, target, axis in zip(found.tensors, likely, self.class_axes, strict=True):
            if axis is None:
                signs = torch.randint(2, mine.shape, generator=generator).to(mine) * 2 - 1
                power = target.square().mean().clamp_min(1e-20)
                part = (mine * signs).flatten(1).sum(1) / (power * mine[0].numel()).sqrt()
            else:
                part = Quality((0,), (axis,)).task_losses(Rows([mine]), [target])
            total = part if total is None else total + part
        assert total is not None
        return total


def _rows(z: Tensor, axis: int) -> Tensor:
    """(N, ..., C, ...) as (rows, C)."""
    return z if z.ndim == 2 else z.movedim(axis, -1).flatten(0, -2)
