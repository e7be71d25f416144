"""How far a block with trained scales is from the full-precision block: a class for each method.

LRQuant+ (IEEE TPAMI 2025, doi 10.1109/TPAMI.2025.3599479) adds the negative logarithm of the cosine similarity to the
squared error, and compares with two targets: the full-precision block on full-precision inputs, which shows what errors
have accumulated, and on the quantized inputs, which shows the block's own.  Each term is divided by its running mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["BLOCK_LOSSES", "BlockLoss", "SquaredError", "TwoBranches", "negative_log_cosine"]

_MOMENTUM = 0.95


def negative_log_cosine(y: Tensor, target: Tensor) -> Tensor:
    """``-log |mean cos|`` of the angles between rows (..., C) of output and target."""
    return -F.cosine_similarity(y, target, dim=-1).mean().abs().clamp(min=1e-6).log()


class BlockLoss(Protocol):
    """Compares a block's outputs (n, ...) with those of the full-precision block on full-precision and on quantized inputs."""

    def terms(self, y: Tensor, accumulated: Tensor, own: Tensor) -> list[Tensor]:
        """What adds up to the loss, () each, before anything is divided by running means."""

    def __call__(self, y: Tensor, accumulated: Tensor, own: Tensor) -> Tensor: ...


class SquaredError:
    """Mean squared error against the full-precision block on full-precision inputs, as in OmniQuant."""

    def terms(self, y: Tensor, accumulated: Tensor, own: Tensor) -> list[Tensor]:
        """The one term."""
        return [F.mse_loss(y, accumulated)]

    def __call__(self, y: Tensor, accumulated: Tensor, own: Tensor) -> Tensor:
        return F.mse_loss(y, accumulated)


class TwoBranches:
    """Squared error and negative logarithm of the cosine against both targets, each over its running mean.

    Parameters
    ----------
    cosine, own, normalised : bool
        Without: the squared error alone; the target on full-precision inputs alone; terms as they are.
    """

    def __init__(self, cosine: bool = True, own: bool = True, normalised: bool = True) -> None:
        self.cosine, self.own, self.normalised = cosine, own, normalised
        self.means: list[Tensor] = []

    @staticmethod
    def running(means: list[Tensor], terms: list[Tensor]) -> list[Tensor]:
        """The running means of terms, () each, with these in them; none yet are these alone."""
        now = [term.detach().clamp(min=1e-12) for term in terms]
        return [_MOMENTUM * a + (1 - _MOMENTUM) * b for a, b in zip(means or now, now, strict=True)]

    def terms(self, y: Tensor, accumulated: Tensor, own: Tensor) -> list[Tensor]:
        """Both terms against both targets."""
        losses = (F.mse_loss, negative_log_cosine) if self.cosine else (F.mse_loss,)
        return [loss(y, target) for target in (accumulated, own)[: 1 + self.own] for loss in losses]

    def __call__(self, y: Tensor, accumulated: Tensor, own: Tensor) -> Tensor:
        terms = self.terms(y, accumulated, own)
        if not self.normalised:
            return torch.stack(terms).sum()
        self.means = self.running(self.means, terms)
        return torch.stack([term / mean for term, mean in zip(terms, self.means, strict=True)]).sum()


#: By the method, as ``smoothing`` names it; methods without a loss are in closed form only.
BLOCK_LOSSES: dict[str, Callable[[], BlockLoss]] = {
    "omniquant": SquaredError,
    "lrquant": TwoBranches,
    "affinequant": SquaredError,
    "flatquant": SquaredError,
}
