"""What kernels with a weight have in common: their arguments, and the way from int32 sums to stored outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm_backend.kernels.cpu import ir
from tvm_backend.kernels.cpu.epilogue import chunks, finish, finish_row, output_arguments, residual_argument
from tvm_backend.kernels.cpu.ir import Expr
from tvm_backend.kernels.cpu.isa import InstructionSet
from tvm_backend.kernels.cpu.packing import WeightLayout
from tvm_backend.kernels.spec import ConvSpec, LinearSpec, QParams

__all__ = ["Blocked", "Operands", "Weighted", "store_row"]


@dataclass(frozen=True)
class Operands:
    """The buffers of a kernel's arguments, and what is done with those that belong to the epilogue."""

    spec: ConvSpec | LinearSpec
    data: Any
    weight: Any
    compensation: Any
    scale: Any
    bias: Any
    residual: Any
    outputs: tuple[Any, ...]

    def scaled(self, total: Expr, channel: Expr, lanes: int) -> Expr:
        """A vector of compensated sums with scale and bias, float32."""
        scale, bias = ir.load(self.scale, [channel], lanes), ir.load(self.bias, [channel], lanes)
        return ir.fma(ir.cast(total, "float32", lanes), scale, bias, lanes)

    def compensated(self, total: Expr, channel: Expr, lanes: int) -> Expr:
        """A vector of sums with the zero point taken out."""
        return total + ir.load(self.compensation, [channel], lanes)

    def finish(self, total: Expr, where: Sequence[Expr], channel: Expr, lanes: int) -> None:
        """From one vector of compensated sums to the outputs at ``[*where, channel]``."""
        value = self.scaled(total, channel, lanes)
        finish(value, self.spec.epilogue, self.residual, self.outputs, [*where, channel], lanes)

    def finish_row(
        self, totals: Sequence[Expr], where: Sequence[Expr], channel: Expr, isa: InstructionSet
    ) -> None:
        """The same for several vectors of consecutive channels."""
        lanes = isa.lanes
        values = [self.scaled(total, channel + i * lanes, lanes) for i, total in enumerate(totals)]
        finish_row(values, self.spec.epilogue, self.residual, self.outputs, [*where, channel], isa)


@dataclass(frozen=True)
class Weighted:
    """Base class of the generators of kernels with a weight.

    Parameters
    ----------
    spec : ConvSpec or LinearSpec
        What to compute.
    isa : InstructionSet
        How products are summed.
    """

    spec: Any
    isa: InstructionSet

    @property
    def flip(self) -> bool:
        """Whether the data have the other sign than what the instruction set multiplies."""
        return self.isa.takes not in ("", self.spec.input.dtype)

    @property
    def stored(self) -> QParams:
        """The activations as the instructions see them."""
        input_: QParams = self.spec.input
        return input_.flipped if self.flip else input_

    @property
    def stored_zero(self) -> int:
        """The zero point of the activations as the instructions see them."""
        return self.stored.zero_point

    @property
    def weight_length(self) -> int:
        """Bytes of the packed weight."""
        raise NotImplementedError

    @property
    def weight_dtype(self) -> str:
        """Element type of the packed weight."""
        return "int8"

    @property
    def unpacking(self) -> str:
        """Where weights below 8 bits become bytes; empty where the kernel reads bytes."""
        return ""

    def arguments(self, batch: Expr) -> list[ir.Argument]:
        """Arguments of the kernel."""
        spec = self.spec
        out_shape = (batch, *spec.out_shape)
        per_channel = (spec.out_shape[-1],)
        return [
            ("data", (batch, *spec.in_shape), spec.input.dtype),
            ("weight", (self.weight_length,), self.weight_dtype),
            ("compensation", per_channel, "int32"),
            ("scale", per_channel, "float32"),
            ("bias", per_channel, "float32"),
            *residual_argument(spec.epilogue, out_shape),
            *output_arguments(spec.epilogue, out_shape),
        ]

    def build(self, name: str) -> Any:
        """The PrimFunc."""
        batch = ir.batch_extent(self.spec.batch)
        with ir.Function(name) as function:
            data, weight, compensation, scale, bias, *rest = function.buffers(self.arguments(batch))
            residual = rest.pop(0) if self.spec.epilogue.residual is not None else None
            self.emit(
                batch, Operands(self.spec, data, weight, compensation, scale, bias, residual, tuple(rest))
            )
        return function.result

    def emit(self, batch: Expr, operands: Operands) -> None:
        """Write the body."""
        raise NotImplementedError


@dataclass(frozen=True)
class Blocked(Weighted):
    """Base class of those whose weights are packed in blocks of channels."""

    @property
    def layout(self) -> WeightLayout:
        """How the weights are packed."""
        raise NotImplementedError

    @property
    def weight_length(self) -> int:
        """Bytes of the packed weight."""
        return self.layout.length

    @property
    def weight_dtype(self) -> str:
        """Element type of the packed weight."""
        return self.layout.dtype


def store_row(
    operands: Operands,
    layout: WeightLayout,
    totals: Sequence[Expr],
    where: Sequence[Expr],
    channel: Expr,
    block: Expr,
    compensated: bool,
) -> None:
    """The epilogue of a row of vectors of sums; in the last block some channels may not exist.

    Parameters
    ----------
    operands : Operands
        The kernel's buffers.
    layout : WeightLayout
        How output channels are put together to blocks.
    totals : sequence of Expr
        The sums, one vector for each vector of the block.
    where : sequence of Expr
        Indices of the output before the channel.
    channel : Expr
        First channel of the block.
    block : Expr
        Number of the block within its group.
    compensated : bool
        Whether the zero point has been taken out of the sums.
    """
    isa = layout.isa
    lanes = isa.lanes
    in_last = layout.out_channels - (layout.blocks - 1) * layout.block_channels

    def some(count: int) -> None:
        whole, rest = divmod(count, lanes)
        if whole:
            row = list(totals[:whole])
            if not compensated:
                row = [operands.compensated(total, channel + i * lanes, lanes) for i, total in enumerate(row)]
            operands.finish_row(row, where, channel, isa)
        for begin, width in chunks(rest, lanes):
            at = channel + (whole * lanes + begin)
            total = ir.part(totals[whole], begin, width)
            if not compensated:
                total = operands.compensated(total, at, width)
            operands.finish(total, where, at, width)

    if layout.blocks == 1 or in_last == layout.block_channels:
        some(in_last)
        return
    with ir.choose(block == layout.blocks - 1) as (last, full):
        with last:
            some(in_last)
        with full:
            some(layout.block_channels)
