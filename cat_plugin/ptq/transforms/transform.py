"""What every equivalent transformation has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import fx

from cat_plugin.ptq.rows import Rows
from cat_plugin.ptq.spec import QuantSpec

__all__ = ["Transform"]


class Transform(ABC):
    """A rewrite that leaves the function of the full-precision graph as it is.

    It knows where it may stand (:meth:`places`) and how it is folded into the weights there (:meth:`fold`).

    Attributes
    ----------
    name : str
        Its name; decides, with the seed, the random numbers it draws.
    """

    name: ClassVar[str]

    @abstractmethod
    def applies(self, module: fx.GraphModule, spec: QuantSpec) -> bool:
        """Whether the specification, or where it leaves the choice the graph, asks for it."""

    @abstractmethod
    def places(self, module: fx.GraphModule) -> Sequence[Any]:
        """Where in the BatchNorm-folded graph it leaves the function unchanged, in order of execution."""

    @abstractmethod
    def fold(
        self, module: fx.GraphModule, inputs: Rows, spec: QuantSpec, generator: torch.Generator
    ) -> Callable[[fx.GraphModule], None] | None:
        """Choose and apply it at every place, in place.

        Parameters
        ----------
        module : fx.GraphModule
            BatchNorm-folded ATen graph without quantizers.
        inputs : Rows
            (N, ...) calibration inputs, one for each of the graph's placeholders; of several processes this one's share.
        spec : QuantSpec
            Bits, and what else decides how much is gained.
        generator : torch.Generator
            CPU generator of every random choice.

        Returns
        -------
        callable or None
            What is left to be done, in place, in the graph with quantizers.
        """
