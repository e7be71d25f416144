"""Closed-form scales and shifts of the channels of a place: a class for each method, in a registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, fx

from cat_plugin.ptq.spec import QuantSpec
from cat_plugin.ptq.transforms.smoothing.places import Place
from cat_plugin.ptq.transforms.smoothing.ranges import Ranges
from cat_plugin.ptq.transforms.smoothing.strength import best_strength, powered

__all__ = [
    "STARTS",
    "LogarithmicEquivalent",
    "OmniQuant",
    "Reparametrization",
    "SearchedRanges",
    "SmoothQuant",
    "Start",
    "searched_reach",
    "searched_strength",
]

_LEAST = 1e-2  # no channel is scaled up by more than a hundred


class Start(ABC):
    """Where scales and shifts begin; where nothing is trained, also where they end.

    Attributes
    ----------
    moves : bool
        Whether channels are shifted where the place permits it.
    products : bool
        Whether queries and keys are scaled.
    searches : bool
        Whether the strength is searched at each place (:mod:`cat_plugin.ptq.transforms.smoothing.strength`).
    functions : bool
        Whether channels behind GELU and its like are scaled too (:mod:`cat_plugin.ptq.transforms.smoothing.functions`).
    """

    moves: ClassVar[bool] = True
    products: ClassVar[bool] = True
    searches: ClassVar[bool] = False
    functions: ClassVar[bool] = False

    @abstractmethod
    def scales(self, reach: Tensor, weight: Tensor, strength: float) -> Tensor:
        """(n,) scales.

        Parameters
        ----------
        reach : Tensor
            (n,) greatest magnitude of each channel, shifted.
        weight : Tensor
            (n,) greatest magnitude of the weights that it is multiplied by.
        strength : float
            Share of the difficulty that is moved into the weights.
        """

    def choose(
        self, place: Place, ranges: Ranges, strength: float, turned: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(n,) positive scales, and shifts where there are any.

        Parameters
        ----------
        place : Place
            Where.
        ranges : Ranges
            Of its channels.
        strength : float
            Share of the difficulty that is moved into the weights.
        turned : bool
            Whether the channels are rotated behind.
        """
        if place.kind == "product":
            ones = torch.ones(place.count)
            return (ranges.ratio.sqrt().clamp(_LEAST, 1 / _LEAST) if self.products else ones), None
        shifts = ranges.middle if self.moves and place.shifted else None
        centre = torch.zeros(()) if shifts is None else shifts
        reach = torch.maximum((ranges.high - centre).abs(), (ranges.low - centre).abs())
        return self.scales(reach, ranges.weight.clamp(min=1e-5), strength).clamp(min=_LEAST), shifts


class SmoothQuant(Start):
    """``s = m^a / w^(1-a)`` (Xiao et al., "SmoothQuant", arXiv 2211.10438, equation 4), without shifts.

    ``m`` is the channel's greatest magnitude, ``w`` its column's in the weights, ``a`` the strength.
    """

    moves = False
    products = False

    def scales(self, reach: Tensor, weight: Tensor, strength: float) -> Tensor:
        return reach.clamp(min=1e-5) ** strength / weight ** (1 - strength)


class OmniQuant(Start):
    """SmoothQuant's scales with shifts, and queries against keys (Shao et al., "OmniQuant", arXiv 2308.13137, section 3.3)."""

    def scales(self, reach: Tensor, weight: Tensor, strength: float) -> Tensor:
        return reach.clamp(min=1e-5) ** strength / weight ** (1 - strength)


class LogarithmicEquivalent(Start):
    """``s = m / log2(2 + m)`` with shifts: LRQuant+'s logarithmic activation equivalent.

    (Zhao et al., "LRQuant+: A Unified and Learnable Framework to Post-training Quantization for Transformer-based Large
    Foundation Models", IEEE TPAMI 2025, doi 10.1109/TPAMI.2025.3599479.)
    """

    def scales(self, reach: Tensor, weight: Tensor, strength: float) -> Tensor:
        return reach / torch.log2(2 + reach)


class Reparametrization(Start):
    """Every channel's searched range brought to the mean range, its middle to zero.

    (Li et al., "RepQ-ViT: Scale Reparameterization for Post-Training Quantization of Vision Transformers", arXiv 2212.08254,
    section 3.3: a scale and a zero point for each channel, folded into the norm and the next layer.)
    """

    products = False

    def scales(self, reach: Tensor, weight: Tensor, strength: float) -> Tensor:
        return reach / reach.mean().clamp(min=1e-5)

    def choose(
        self, place: Place, ranges: Ranges, strength: float, turned: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        if place.kind != "norm":
            return torch.ones(place.count), None
        reach, shifts = searched_reach(place, ranges, turned)
        return self.scales(reach, ranges.weight, strength).clamp(min=_LEAST), shifts


def searched_reach(place: Place, ranges: Ranges, turned: bool = False) -> tuple[Tensor, Tensor | None]:
    """(n,) half the width of the searched ranges, and their middles where channels may be shifted.

    Channels that are rotated behind (`turned`) lose their mean instead, and reach from there: what is left of it would
    stand in every sum.
    """
    low, high = ranges.clipped_low, ranges.clipped_high
    if place.shifted and turned:
        return torch.maximum(high - ranges.mean, ranges.mean - low), ranges.mean
    if place.shifted:
        return (high - low) / 2, (low + high) / 2
    return torch.maximum(low.abs(), high.abs()), None


def searched_strength(
    module: fx.GraphModule,
    place: Place,
    ranges: Ranges,
    spec: QuantSpec,
    turns: Mapping[fx.Node, Callable[[Tensor], Tensor]] | None = None,
) -> tuple[float, float]:
    """:func:`~.strength.best_strength` of searched ranges at the bits of a specification."""
    reach = searched_reach(place, ranges, turns is not None)
    bits = (spec.w_bits, None if spec.weight_only else spec.a_bits)
    return best_strength(module, place, ranges.samples, *reach, bits, spec.weight_groups, turns)


class SearchedRanges(Start):
    """Searched ranges to the power that loses least at each place, wherever channels may be scaled."""

    searches = True
    functions = True

    def scales(self, reach: Tensor, weight: Tensor, strength: float) -> Tensor:
        return powered(reach, strength)

    def choose(
        self, place: Place, ranges: Ranges, strength: float, turned: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        if place.kind == "product":
            return super().choose(place, ranges, strength)
        reach, shifts = searched_reach(place, ranges, turned)
        return self.scales(reach, ranges.weight, strength).clamp(min=_LEAST), shifts


#: By the name that ``smoothing`` has in a specification.
STARTS: dict[str, Start] = {
    "smoothquant": SmoothQuant(),
    "omniquant": OmniQuant(),
    "lrquant": LogarithmicEquivalent(),
    "affinequant": OmniQuant(),
    "flatquant": OmniQuant(),
    "repq": Reparametrization(),
    "searched": SearchedRanges(),
}
