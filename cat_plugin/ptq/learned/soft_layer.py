"""What is trained of one layer: the interface that every way of training it has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from cat_plugin.ptq.graph.modules import QuantOp

__all__ = ["SoftLayer"]


class SoftLayer(ABC):
    """A layer whose weight is differentiable in what is trained of it.

    Parameters
    ----------
    layer : QuantOp
        With integers chosen.

    Attributes
    ----------
    relaxed : bool
        Whether the weight differs, while gradients are taken, from that of the integers that would be written.
    start : Tensor
        (O, ...) float, the integers at the beginning.
    log_scale : Tensor
        (O,) logarithm of the weight's scale.
    bias : Tensor or None
        (O,) in use.

    Raises
    ------
    ValueError
        If the layer has no integers yet.
    """

    relaxed: ClassVar[bool] = False
    bias: Tensor | None

    def __init__(self, layer: QuantOp) -> None:
        if layer.q_weight is None:
            raise ValueError(f"layer {layer.name} has no integers to start from; fit it first.")
        self.layer = layer
        self.start = layer.q_weight.float()
        self.log_scale = layer.scale.detach().log().requires_grad_()

    @abstractmethod
    def trained(self) -> list[Tensor]:
        """Everything that is trained, always in the same order."""

    @abstractmethod
    def weight(self) -> Tensor:
        """(O, ...) weight as the layer computes with it now, differentiable; that of integers without gradients."""

    def regularizer(self, share: float) -> Tensor | None:
        """What to add to the loss when ``share`` of the steps, 0..1, is done; None adds nothing."""
        return None

    @abstractmethod
    def harden(self) -> None:
        """Write what was trained into the layer."""
