"""Specifications of what has a grid for each token, or scales for groups of weights: finer than a tensor and a channel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from tvm_backend.kernels.spec.base import KernelSpec, Operand
from tvm_backend.kernels.spec.layers import LinearSpec
from tvm_backend.kernels.spec.values import QParams, TensorKind, check_batch, check_positive, require

__all__ = ["LEAST_SCALE", "GroupedLinearSpec", "TokensSpec"]

LEAST_SCALE = 1e-8
"""No token's scale is smaller."""


@dataclass(frozen=True)
class TokensSpec(KernelSpec):
    """Tokens (N, features) of float32, each on a grid of its own that comes from its range; arguments: data, outputs.

    With ``l`` and ``h`` the least and greatest number of a token, 0 among them, times `share`: the scale is
    ``s = max((h - l) * float32(1 / qmax), 1e-8)``, the zero point ``z = rint(-l / s)`` and an integer
    ``clamp(rint(x * (1 / s) + z), 0, qmax)``, all in float32, ties to even.  Outputs are the integers, uint8 (N, features), and the
    grids, float32 (N, 2) of ``s`` and ``z``.  A token with a number that is not finite has NaN for its scale.

    Parameters
    ----------
    batch : int or None
        Number of tokens; None makes it a run-time value.
    features : int
        Length of a token.
    qmax : int
        The largest integer.
    share : float
        Of each range that is kept.
    real : bool
        Whether ``(q - z) * s`` is the only output instead, for what computes in float32.
    """

    operation: ClassVar[str] = "quantize"

    batch: int | None
    features: int
    qmax: int
    share: float = 1.0
    real: bool = False

    def __post_init__(self) -> None:
        check_batch(self.batch)
        check_positive(self, "features", "qmax")
        require(self.qmax <= 255, f"integers up to {self.qmax} do not fit into uint8")
        require(math.isfinite(self.share) and self.share > 0, f"share={self.share} must be above 0")

    @property
    def name(self) -> str:
        """What it computes, and the length of a token."""
        return f"{'round' if self.real else 'quantize'}_tokens_{self.features}"

    @property
    def reads(self) -> tuple[Operand, ...]:
        """The tokens."""
        return (Operand("data", (self.features,), "float32"),)

    @property
    def out_shape(self) -> tuple[int]:
        """That of a token."""
        return (self.features,)

    @property
    def out_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the token and its grid."""
        return ((self.features,),) if self.real else ((self.features,), (2,))

    @property
    def out_kinds(self) -> tuple[TensorKind, ...]:
        """Integers, which have no scale of their own, and the grid."""
        return ("float32",) if self.real else (QParams(1.0, 0, 0, self.qmax, "uint8"), "float32")


@dataclass(frozen=True)
class GroupedLinearSpec(LinearSpec):
    """A linear layer with scales that are finer than channels and tensors; the weight has shape (C_out, C_in).

    Kernel arguments: data, packed weight, int32 compensation and float32 scale, both (groups, C_out) filled up with zeros to whole
    blocks, float32 bias (C_out,), for `tokens` the grids (N, 2), residual if any, outputs.

    The integer sum of each group of inputs is exact; ``v = fma(float32(sum), scale[group], v)`` from 0 on, group by group.  Then the
    bias is added, for tokens by ``fma(v, scale of the token, bias)``.  Where the data are float32 their products with the integers of a group
    are summed in float32, in any order.

    Parameters
    ----------
    groups : int
        Equal stretches of the inputs, each with a scale for every output.
    tokens : bool
        Whether each row has a grid of its own, see :class:`TokensSpec`; `input` then has scale 1 and zero point 0.
    real : bool
        Whether the data are float32 instead, of which `input` says nothing.
    """

    groups: int = 1
    tokens: bool = False
    real: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "groups")
        require(
            self.in_features % self.groups == 0,
            f"{self.in_features} features cannot be cut into {self.groups} equal groups",
        )
        require(not (self.tokens and self.real), "float32 data have no grids")

    @property
    def name(self) -> str:
        """What it computes: features in and out, groups, and whether rows have their own grids."""
        groups = f"_{self.groups}groups" if self.groups > 1 else ""
        return f"{super().name}{groups}{'_tokens' if self.tokens else '_float' if self.real else ''}"

    @property
    def reads(self) -> tuple[Operand, ...]:
        """The data, their grids, and the residual if there is one."""
        data = Operand("data", self.in_shape, "float32" if self.real else self.input)
        grid = (Operand("grid", (2,), "float32"),) if self.tokens else ()
        return (data, *grid, *self.residuals)
