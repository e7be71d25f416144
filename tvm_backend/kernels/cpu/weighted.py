"""What kernels with a weight have in common: their arguments, and the way from int32 sums to stored outputs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from tvm.tirx import PrimFunc

from cat_plugin.errors import CompileError
from tvm_backend.kernels import tir
from tvm_backend.kernels.cpu import ir
from tvm_backend.kernels.cpu.epilogue import chunks, finish, finish_row
from tvm_backend.kernels.cpu.generator import CpuGenerator
from tvm_backend.kernels.cpu.isa import InstructionSet
from tvm_backend.kernels.cpu.packing import WeightLayout
from tvm_backend.kernels.cpu.quantity import EACH, Finish, form_of, numbers_of, quantities
from tvm_backend.kernels.spec import Argument, QParams, WeightedSpec
from tvm_backend.kernels.tir import Expr

__all__ = [
    "Blocked",
    "Operands",
    "Weighted",
    "largest_activation",
    "largest_sums",
    "store_row",
    "vectors_for",
]

_Spec = TypeVar("_Spec", bound=WeightedSpec)
_STEP = 4  # bytes of a channel that one instruction takes, where 16 bits hold sums of two


@dataclass(frozen=True)
class Operands:
    """The buffers of a kernel's arguments, and what is done with those that belong to the epilogue."""

    spec: WeightedSpec
    data: Any
    weight: Any
    compensation: Any
    scale: Any
    bias: Any
    numbers: Any
    residual: Any
    outputs: tuple[Any, ...]
    grid: Any = None

    @property
    def epilogue(self) -> Finish:
        """The epilogue, its numbers those of the argument."""
        return Finish.held(self.spec, self.numbers)

    @property
    def zero(self) -> Expr:
        """The zero point of the activations as the instructions see them, float32."""
        return tir.load(self.numbers, [EACH * len(quantities(self.spec))])

    def scaled(self, total: Expr, channel: Expr, lanes: int) -> Expr:
        """A vector of compensated sums with scale and bias, float32."""
        scale, bias = tir.load(self.scale, [channel], lanes), tir.load(self.bias, [channel], lanes)
        return ir.fma(tir.cast(total, "float32", lanes), scale, bias, lanes)

    def compensated(self, total: Expr, channel: Expr, lanes: int) -> Expr:
        """A vector of sums with the zero point taken out."""
        return total + tir.load(self.compensation, [channel], lanes)

    def finish(self, total: Expr, where: Sequence[Expr], channel: Expr, lanes: int) -> None:
        """From one vector of compensated sums to the outputs at ``[*where, channel]``."""
        value = self.scaled(total, channel, lanes)
        finish(value, self.epilogue, self.residual, self.outputs, [*where, channel], lanes)

    def finish_row(
        self, totals: Sequence[Expr], where: Sequence[Expr], channel: Expr, isa: InstructionSet
    ) -> None:
        """The same for several vectors of consecutive channels."""
        lanes = isa.lanes
        values = [self.scaled(total, channel + i * lanes, lanes) for i, total in enumerate(totals)]
        finish_row(values, self.epilogue, self.residual, self.outputs, [*where, channel], isa)


@dataclass(frozen=True)
class Weighted(CpuGenerator[_Spec]):
    """Base class of the generators of kernels with a weight."""

    @property
    def flip(self) -> bool:
        """Whether the data have the other sign than what the instruction set multiplies."""
        return self.isa.takes not in ("", self.spec.input.dtype)

    @property
    def stored(self) -> QParams:
        """The activations as the instructions see them."""
        return self.spec.input.flipped if self.flip else self.spec.input

    @property
    def stored_zero(self) -> int:
        """The zero point of the activations as the instructions see them."""
        return self.stored.zero_point

    @property
    def weight_dtype(self) -> str:
        """Element type of the packed weight."""
        return "int8"

    @property
    def form(self) -> Hashable:
        """Everything but the numbers of quantizations, which are an argument."""
        return type(self).__name__, self.isa, form_of(self.spec)

    @property
    def numbers(self) -> NDArray[np.float32]:
        """What the argument ``numbers`` holds; see :func:`~tvm_backend.kernels.cpu.quantity.numbers_of`."""
        return numbers_of(self.spec, self.stored_zero)

    def arguments(self, batch: Expr) -> list[Argument]:
        """The kernel's arguments, in order: those of the specification, with ``numbers`` behind the bias."""
        arguments = self.spec.weighted_arguments(batch, self.weight_length, self.weight_dtype)
        return [*arguments[:5], ("numbers", self.numbers.shape, "float32"), *arguments[5:]]

    def build(self, name: str) -> PrimFunc:
        """The PrimFunc."""
        batch = tir.batch_extent(self.spec.batch)
        with tir.Function(name) as function:
            data, weight, compensation, scale, bias, numbers, *rest = function.buffers(self.arguments(batch))
            further = {operand.name: rest.pop(0) for operand in self.spec.reads[1:]}
            constants = (compensation, scale, bias, numbers, further.get("residual"))
            self.emit(batch, Operands(self.spec, data, weight, *constants, tuple(rest), further.get("grid")))
        return function.result

    @abstractmethod
    def emit(self, batch: Expr, operands: Operands) -> None:
        """Write the body."""


@dataclass(frozen=True)
class Blocked(Weighted[_Spec]):
    """Base class of those whose weights are packed in blocks of channels."""

    @property
    @abstractmethod
    def layout(self) -> WeightLayout:
        """How the weights are packed."""

    @abstractmethod
    def stretched(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Weights of shape ``spec.weight_shape`` by group, channel and stretch of consecutive activations."""

    def for_weight(self, weight: NDArray[Any]) -> Self:
        """The same on the set for the weight's values."""
        if not self.isa.by_values:
            return self
        fitting = self.isa.for_sums(largest_activation(self.spec), *largest_sums(self.stretched(weight)))
        return self if fitting == self.isa else replace(self, isa=fitting)

    def pack_weight(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Pack weights of shape ``spec.weight_shape``."""
        stretched = self.stretched(weight)
        if self.isa.by_values and not self.isa.holds(largest_activation(self.spec), *largest_sums(stretched)):
            raise CompileError(
                f"the weights of {self.spec.name} are too large for a kernel that was made for smaller ones"
            )
        return self.layout.pack(stretched)

    @property
    def remark(self) -> str:
        """Where only the size of some weights forbids the faster instructions."""
        without = self.isa.for_sums(largest_activation(self.spec), 128)
        return (
            ""
            if without == self.isa or self.isa.group > 2
            else "in words: neighbouring weights exceed 128 (see bounded_sums)"
        )

    @property
    def weight_length(self) -> int:
        """Bytes of the packed weight."""
        return self.layout.length

    @property
    def weight_dtype(self) -> str:
        """Element type of the packed weight."""
        return self.layout.dtype


def largest_activation(spec: WeightedSpec) -> int:
    """The largest activation of a layer, padding included, as unsigned bytes."""
    stored = spec.input if spec.input.dtype == "uint8" else spec.input.flipped
    return max(stored.qmax, stored.zero_point)


def largest_sums(stretched: NDArray[Any]) -> tuple[int, int]:
    """What neighbouring weights of one sign add up to at most: two that are multiplied together, and four with the next step's.

    Steps are those of sets that multiply four bytes at a time, two and two from the beginning of each stretch
    (:meth:`~tvm_backend.kernels.cpu.sums.Sums.loop`), or of all stretches where each is one step (:meth:`~.Sums.loops`).
    """
    weight = np.asarray(stretched).astype(np.int16)
    steps = np.pad(weight, [(0, 0)] * (weight.ndim - 1) + [(0, -weight.shape[-1] % _STEP)])
    if steps.shape[-1] == _STEP:
        steps = steps.reshape(*steps.shape[:-2], -1)
    steps = np.pad(steps, [(0, 0)] * (steps.ndim - 1) + [(0, steps.shape[-1] % (2 * _STEP))])
    pairs = [part.reshape(-1, 2, 2, 2).sum(-1) for part in (np.maximum(steps, 0), np.maximum(-steps, 0))]
    return max(int(part.max()) for part in pairs), max(int(part.sum(1).max()) for part in pairs)


def vectors_for(spec: WeightedSpec, isa: InstructionSet) -> InstructionSet:
    """The vectors of an instruction set for the values that a layer multiplies."""
    bits = spec.storage_bits
    return isa.vector.for_values(largest_activation(spec), (1 << bits) - 1 if bits < 8 else 128)


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
    with tir.choose(block == layout.blocks - 1) as (last, full):
        with last:
            some(in_last)
        with full:
            some(layout.block_channels)
