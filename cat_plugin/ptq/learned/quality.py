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
from cat_plugin.logits import LogitsOf, as_rows
from cat_plugin.ptq.graph.interface import Interface
from cat_plugin.ptq.graph.ops import is_batched, output_leaves
from cat_plugin.ptq.rows import Rows

__all__ = ["Quality", "divergence"]


def _divergences(z_q: Tensor, z_fp: Tensor, temperature: float) -> Tensor:
    """(N,) ``T^2 KL(softmax(z_fp / T) || softmax(z_q / T))``; logits (N, C)."""
    log_q = F.log_softmax(z_q / temperature, 1)
    log_p = F.log_softmax(z_fp / temperature, 1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1) * temperature**2


def divergence(z_q: Tensor, z_fp: Tensor, temperature: float) -> Tensor:
    """Mean over rows of ``T^2 KL(softmax(z_fp / T) || softmax(z_q / T))``; logits (N, C)."""
    return _divergences(z_q, z_fp, temperature).mean()


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
        cls,
        graph: fx.Graph,
        outputs: Sequence[str] = (),
        logits: str | None = None,
        class_axis: int | None = None,
    ) -> Quality:
        """What a specification asks for.

        Parameters
        ----------
        graph : fx.Graph
            Of a traced model.
        outputs : sequence of str
            Name patterns of the results that count; none is all.
        logits, class_axis : str, int or None
            Which result is logits, and its axis of classes (:class:`cat_plugin.logits.LogitsOf`); None is a single result
            (N, C), and else nothing.

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

        def counts(name: str, pattern: str) -> bool:
            return fnmatch.fnmatchcase(name, pattern) or pattern == str(real[name])

        for pattern in outputs:
            if not any(counts(name, pattern) for name in real):
                raise QuantizationError(LogitsOf(pattern).missing(list(real)))
        asked = LogitsOf(logits, class_axis)
        place = asked.find(names) if asked.given else None
        if logits is not None and (place is None or names[place] not in real):
            raise QuantizationError(asked.missing(list(real)))
        chosen = [
            name
            for name, leaf in real.items()
            if not outputs or leaf == place or any(counts(name, pattern) for pattern in outputs)
        ]
        axes: list[int | None] = []
        for name in chosen:
            ndim = found[real[name]].meta["val"].ndim
            if real[name] == place:
                axes.append(asked.axis(ndim))
                if axes[-1] is None:
                    raise QuantizationError(asked.no_axis(name, ndim))
            else:
                axes.append(1 if not asked.given and len(found) == 1 and ndim == 2 else None)
        return cls(tuple(real[name] for name in chosen), tuple(axes))

    def nodes(self, graph: fx.Graph) -> list[fx.Node]:
        """The nodes that hold what counts."""
        leaves = output_leaves(graph)
        return [leaves[place] for place in self.leaves]

    def error(self, found: Rows, wanted: Rows, temperature: float) -> Tensor:
        """() how far results are from those of full precision, aligned with :attr:`leaves`; the latter may be kept elsewhere."""
        return self.errors(found, wanted, temperature).mean()

    def errors(self, found: Rows, wanted: Rows, temperature: float) -> Tensor:
        """(n,) what :meth:`error` is the mean of; squared errors are over the power of all rows."""
        total: Tensor | None = None
        wanted = wanted.to(found.device)
        for mine, other, axis in zip(found.tensors, wanted.tensors, self.class_axes, strict=True):
            if axis is None:
                part = (mine - other).square() / other.square().mean().clamp_min(1e-20)
            else:
                part = _divergences(as_rows(mine, axis), as_rows(other, axis), temperature)
            part = part.reshape(len(mine), -1).mean(1)
            total = part if total is None else total + part
        assert total is not None
        return total

    def changed(self, found: Rows, wanted: Rows) -> tuple[int, int]:
        """At how many places with logits the likeliest class is another, and how many such places there are."""
        others = places = 0
        for mine, other, axis in zip(found.tensors, wanted.tensors, self.class_axes, strict=True):
            if axis is not None:
                different = as_rows(mine, axis).argmax(1) != as_rows(other, axis).argmax(1)
                others, places = others + int(different.sum()), places + len(different)
        return others, places

    def likely(self, wanted: Rows) -> list[Tensor]:
        """What a task loss compares results with: the likeliest classes, and what is no logits as it is."""
        return [
            x if axis is None else as_rows(x, axis).argmax(1)
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
                part = F.cross_entropy(as_rows(mine, axis), target, reduction="none")
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

    def curvature_probe(self, found: Rows, temperature: float, generator: torch.Generator) -> Tensor:
        """() a random projection of the results; the covariance of its gradient is the curvature of :meth:`error`.

        Of logits ``r' z`` with ``r = (diag(s) - p s') e``, ``p = softmax(z / T)``, ``s = sqrt(p)`` and ``e`` random signs:
        the mean of ``r r'`` is the Fisher information ``diag(p) - p p'``.
        """
        total: Tensor | None = None
        for mine, axis in zip(found.tensors, self.class_axes, strict=True):
            signs = (torch.randint(2, mine.shape, generator=generator) * 2 - 1).to(mine)
            if axis is not None:
                p = torch.softmax(mine.detach() / temperature, axis)
                root = p.sqrt() * signs
                signs = root - p * root.sum(axis, keepdim=True)
            else:
                signs = signs / mine.detach().square().mean().clamp_min(1e-20).sqrt()
            part = (mine * signs).sum()
            total = part if total is None else total + part
        assert total is not None
        return total
