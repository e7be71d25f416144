"""A convolution or linear layer under quantization: float weight, grid, integers, in one module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cat_plugin.ptq.graph.ops import KIND
from cat_plugin.ptq.quantizers.neighbours import TOGETHER, bounded, partners
from cat_plugin.ptq.quantizers.uniform import integer_range

__all__ = ["LEAST_MODULATION", "QuantOp", "modulation"]

#: What the product of rotation vectors is clipped to, so that no step vanishes.
LEAST_MODULATION = 1e-2


def modulation(left: Tensor, right: Tensor) -> Tensor:
    """(O, I) product of (O, k) and (k, I) rotation vectors, which stays positive."""
    return (left @ right).clamp(min=LEAST_MODULATION)


class QuantOp(nn.Module):
    """One weighted ATen operation whose weight is on a grid for each channel, or for each group of a channel's inputs.

    Parameters
    ----------
    name : str
        Qualified name of the user's layer.
    target : callable
        The ATen operation.
    weight : Tensor
        (O, ...) float.
    bias : Tensor or None
        (O,) float.
    extra : tuple
        Arguments of the operation after the bias (stride, padding, ...).
    w_bits, a_bits : int
        Bits of the weight, and of the input (for the report; the input has its own quantizer).
    group : int or None
        Input features of a linear layer that share a scale, which divide all of them; None is one scale a channel.
    vectors : tuple of Tensor or None
        (O, k) and (k, I) of a linear layer, whose product multiplies its steps element by element.

    Attributes
    ----------
    scale, zero_point : Tensor
        (O,) float32 and int64 grid of the weight, one for each output channel; (O, I / group) with groups.
    weight, bias : Tensor
        What is approximated: the trained weight, or the one refitted to quantized inputs, and the bias in use.
    float_weight, float_bias : Tensor
        The trained ones; full-precision values are computed with these.
    q_weight : Tensor or None
        (O, ...) int8 integers once chosen; None computes with the float weight.
    left, right : Tensor or None
        The vectors.
    bounded : {"pairs", "fours"} or None
        How many neighbouring 8-bit weights are kept from exceeding what bytes can be multiplied by.
    """

    weight: Tensor
    bias: Tensor | None
    scale: Tensor
    zero_point: Tensor
    q_weight: Tensor | None
    float_weight: Tensor
    float_bias: Tensor | None
    left: Tensor | None
    right: Tensor | None

    def __init__(
        self,
        name: str,
        target: Any,
        weight: Tensor,
        bias: Tensor | None,
        extra: tuple[Any, ...],
        w_bits: int,
        a_bits: int,
        group: int | None = None,
        vectors: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.group = group
        self.bounded: str | None = None
        self.name, self.target, self.extra = name, target, extra
        self.w_bits, self.a_bits = w_bits, a_bits
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("float_weight", weight)
        self.register_buffer("float_bias", bias)
        shape = (len(weight),) if group is None else (len(weight), weight.shape[1] // group)
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("q_weight", None)
        left, right = vectors if vectors is not None else (None, None)
        self.register_buffer("left", left)
        self.register_buffer("right", right)

    @property
    def kind(self) -> str:
        """``conv1d``, ``conv2d`` or ``linear``."""
        return KIND[self.target]

    @property
    def qrange(self) -> tuple[int, int]:
        """Least and greatest integer of the weight."""
        return integer_range(self.w_bits, True)

    @property
    def groups(self) -> int:
        """Groups of a convolution, 1 for a linear layer."""
        return int(self.extra[3]) if len(self.extra) > 3 else 1

    @property
    def neighbours(self) -> Tensor | None:
        """(K, n) inputs of a channel that are multiplied side by side; None where their weights are free."""
        products = (self.w_bits, self.a_bits)  # of fewer bits they fit in 16 anyway
        if self.bounded is None or products != (8, 8):
            return None
        dilation = self.extra[2][-1] if len(self.extra) > 2 and self.kind != "linear" else 1
        # each tap of a depthwise kernel is added up by itself
        if self.groups > 1 and self.weight.shape[1] == 1:
            return None
        found = partners(tuple(self.weight.shape), self.groups, int(dilation), TOGETHER[self.bounded])
        return found.to(self.weight.device)

    def per_channel(self, values: Tensor) -> Tensor:
        """Reshape (O,) so that it broadcasts over the weight; repeat (O, I / group) over each group's features."""
        if values.ndim == 2:
            return values.repeat_interleave(self.weight.shape[1] // values.shape[1], 1)
        return values.reshape(-1, *[1] * (self.weight.ndim - 1))

    @property
    def modulation(self) -> Tensor | None:
        """(O, I) product of the vectors; None where there are none."""
        return None if self.left is None or self.right is None else modulation(self.left, self.right)

    def steps(self, scale: Tensor) -> Tensor:
        """Distances of the grid's points for a scale of the weight, such that they broadcast over it."""
        step, factor = self.per_channel(scale), self.modulation
        return step if factor is None else step * factor

    def round_to_nearest(self) -> Tensor:
        """(O, ...) int8 weight, each value rounded to the nearest point of the grid."""
        qmin, qmax = self.qrange
        scale, zero = self.steps(self.scale), self.per_channel(self.zero_point)
        return self.admissible(torch.clamp(torch.round(self.weight / scale) + zero, qmin, qmax)).to(
            torch.int8
        )

    def admissible(self, integers: Tensor) -> Tensor:
        """(O, ...) integers, those of neighbours moved towards zero where they exceed their bound."""
        neighbours = self.neighbours
        if neighbours is None:
            return integers
        return bounded(integers.flatten(1), neighbours).reshape(integers.shape)

    def dequantized(self) -> Tensor:
        """(O, ...) float32 weight that the integers stand for, or the float weight if none were chosen."""
        if self.q_weight is None:
            return self.weight
        integers = self.q_weight.float() - self.per_channel(self.zero_point).float()
        return integers * self.steps(self.scale)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The operation on ``x`` with another weight and bias."""
        return self.target(x, weight, bias, *self.extra)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """The operation with the weight as it stands."""
        return self.compute(x, self.dequantized(), self.bias)
