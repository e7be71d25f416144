"""What every specification says of its kernel, so that nothing else has to know one kind from another."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

from tvm_backend.kernels.spec.values import Epilogue, QParams, TensorKind, itemsize, storage_dtype

__all__ = ["Argument", "EpilogueSpec", "KernelSpec", "Operand", "WeightedSpec"]

Argument = tuple[str, tuple[Any, ...], str]
"""Name, shape and dtype of a kernel's argument; the batch in a shape may be a TIR variable."""


class Operand(NamedTuple):
    """A tensor that a kernel reads: its name, its shape without the batch, and what it holds."""

    name: str
    shape: tuple[int, ...]
    kind: TensorKind


class KernelSpec(ABC):
    """Base class of all specifications: frozen dataclasses that check themselves.

    Attributes
    ----------
    batch : int or None
        Batch size; None makes it a run-time value.
    operation : str
        What is computed, in one word, for reports.
    """

    batch: int | None
    operation: ClassVar[str]

    @property
    @abstractmethod
    def name(self) -> str:
        """A name for the kernel that says what it computes; not unique."""

    @property
    @abstractmethod
    def reads(self) -> tuple[Operand, ...]:
        """The tensors with a batch that are read, in the order of the arguments."""

    @property
    @abstractmethod
    def out_shape(self) -> tuple[int, ...]:
        """Shape of every output without the batch."""

    @property
    @abstractmethod
    def out_kinds(self) -> tuple[TensorKind, ...]:
        """What each output holds."""

    @property
    def out_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of each output without the batch, where they differ."""
        return (self.out_shape,) * len(self.out_kinds)

    @property
    def read_bytes(self) -> int:
        """Bytes that are read for one sample, the weight aside."""
        return sum(math.prod(operand.shape) * itemsize(operand.kind) for operand in self.reads)

    def moved_bytes(self, weight_bytes: int = 0) -> int:
        """Bytes of inputs and outputs for one sample, plus a packed weight of `weight_bytes` once."""
        outputs = zip(self.out_shapes, self.out_kinds, strict=True)
        written = sum(math.prod(shape) * itemsize(kind) for shape, kind in outputs)
        return self.read_bytes + weight_bytes + written

    @property
    def operations(self) -> int:
        """Multiplications and additions for one sample; for kernels without a weight, bytes moved."""
        return self.moved_bytes()

    def arguments(self, batch: Any) -> list[Argument]:
        """The arguments of a kernel without a weight, in order.

        Parameters
        ----------
        batch : int or TIR expression
            The batch dimension.
        """
        return [*_read(self.reads, batch), *self.output_arguments(batch)]

    def output_arguments(self, batch: Any) -> list[Argument]:
        """The arguments that the kernel writes."""
        outputs = zip(self.out_shapes, self.out_kinds, strict=True)
        return [
            (f"output{i}", (batch, *shape), storage_dtype(kind)) for i, (shape, kind) in enumerate(outputs)
        ]


def _read(operands: tuple[Operand, ...], batch: Any) -> list[Argument]:
    return [(name, (batch, *shape), storage_dtype(kind)) for name, shape, kind in operands]


class EpilogueSpec(KernelSpec):
    """Base class of specifications whose values go through an epilogue.

    Attributes
    ----------
    epilogue : Epilogue
        What is made of a value before it is stored.
    """

    epilogue: Epilogue

    @property
    def out_kinds(self) -> tuple[TensorKind, ...]:
        """What each output holds."""
        return self.epilogue.outputs

    @property
    def residuals(self) -> tuple[Operand, ...]:
        """The residual, if there is one."""
        kind = self.epilogue.residual
        return () if kind is None else (Operand("residual", self.out_shape, kind),)


class WeightedSpec(EpilogueSpec):
    """Base class of specifications of layers with a weight.

    Attributes
    ----------
    input : QParams
        How the data are quantized.
    weight_bits : int
        2 to 8: weights lie in ``-2**(bits-1) .. 2**(bits-1) - 1`` or, where an asymmetric zero point below 8 bits
        was folded, in any range of that many values inside int8.
    """

    input: QParams
    weight_bits: int

    @property
    @abstractmethod
    def in_shape(self) -> tuple[int, ...]:
        """Shape of the input without the batch."""

    @property
    @abstractmethod
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the unpacked weight, output channels first."""

    @property
    @abstractmethod
    def macs(self) -> int:
        """Multiply-accumulate operations for one sample."""

    @property
    def storage_bits(self) -> int:
        """Bits in which a weight is stored: 2, 4 or 8."""
        return 2 if self.weight_bits <= 2 else 4 if self.weight_bits <= 4 else 8

    @property
    def operations(self) -> int:
        """Multiplications and additions for one sample."""
        return 2 * self.macs

    @property
    def reads(self) -> tuple[Operand, ...]:
        """The data, and the residual if there is one."""
        return (Operand("data", self.in_shape, self.input), *self.residuals)

    def weighted_arguments(self, batch: Any, length: int, dtype: str) -> list[Argument]:
        """The kernel's arguments in order.

        Parameters
        ----------
        batch : int or TIR expression
            The batch dimension.
        length : int
            Elements of the packed weight.
        dtype : str
            Their type.
        """
        data, *further = _read(self.reads, batch)
        channels = (self.out_shape[-1],)
        return [
            data,
            ("weight", (length,), dtype),
            ("compensation", channels, "int32"),
            ("scale", channels, "float32"),
            ("bias", channels, "float32"),
            *further,
            *self.output_arguments(batch),
        ]
