"""What a kernel is, and what everything that generates one has in common."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from tvm.tirx import PrimFunc

from cat_plugin.errors import CompileError
from tvm_backend.kernels import tir
from tvm_backend.kernels.spec import Argument, KernelSpec
from tvm_backend.kernels.weights import zero_point_sums

__all__ = ["Generator", "Kernel", "Machine"]


@dataclass(frozen=True)
class Machine(ABC):
    """What a kernel is written for: a processor, or a GPU, with certain instructions.

    Parameters
    ----------
    name : str
        Short name, used in reports.

    Attributes
    ----------
    device : {"cpu", "cuda"}
        Which column of the registry holds its generators.
    prefix : str
        What the names of its kernels begin with.
    has_tile_state : bool
        Whether its kernels use registers that Linux grants to a process only when it asks (AMX).
    """

    name: str

    device: ClassVar[Literal["cpu", "cuda"]]
    prefix: ClassVar[str] = ""
    has_tile_state: ClassVar[bool] = False


_Spec = TypeVar("_Spec", bound=KernelSpec)
_Isa = TypeVar("_Isa", bound=Machine)


@dataclass(frozen=True)
class Generator(ABC, Generic[_Spec, _Isa]):
    """Base class of the generators: one writes the function of one specification for one machine.

    Parameters
    ----------
    spec : KernelSpec
        What to compute.
    isa : Machine
        With which instructions.
    """

    spec: _Spec
    isa: _Isa

    @classmethod
    def takes(cls, spec: _Spec, isa: Machine) -> bool:
        """Whether it computes `spec` on a machine, and well; the registry asks its generators in order."""
        return True

    @classmethod
    def make(cls, spec: _Spec, isa: _Isa) -> Self:
        """The generator of a specification that it takes; it may choose among the machine's instructions."""
        return cls(spec, isa)

    def for_weight(self, weight: NDArray[Any]) -> Self:
        """The generator for layers with this weight: what its values allow may be faster than what its bits allow."""
        return self

    @property
    def form(self) -> Hashable:
        """What the function depends on; generators of equal form write the same one."""
        return type(self).__name__, self.isa, self.spec

    @property
    def numbers(self) -> NDArray[np.float32] | None:
        """The argument behind the bias that holds the numbers of quantizations; None where they are in the code."""
        return None

    @property
    def remark(self) -> str:
        """What the report is to say of the kernel; mostly nothing."""
        return ""

    @property
    def weight_length(self) -> int:
        """Bytes of the packed weight; 0 without one."""
        return 0

    @property
    def unpacking(self) -> str:
        """Where weights below 8 bits become bytes; empty where the kernel reads bytes."""
        return ""

    @property
    def stored_zero(self) -> int:
        """The zero point of the activations as the instructions see them."""
        return 0

    def pack_weight(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Bring integer weights of shape ``spec.weight_shape`` into the order in which the kernel reads them."""
        raise CompileError(f"{self.spec.name} has no weight to pack")

    def arguments(self, batch: Any) -> list[Argument]:
        """The kernel's arguments, in order."""
        return self.spec.arguments(batch)

    def compensation(self, weight: NDArray[Any]) -> NDArray[np.int32]:
        """The int32 argument that takes the zero point out of the sums, see :meth:`Kernel.compensation`."""
        return zero_point_sums(weight, self.stored_zero)

    def channelwise(self, values: NDArray[Any]) -> NDArray[Any]:
        """Scales in the shape in which the kernel reads them; those of channels have it."""
        return values

    @abstractmethod
    def build(self, name: str) -> PrimFunc:
        """Write the function, to be called `name`."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel that is ready to be added to a module.

    Parameters
    ----------
    name : str
        Name that says what it computes; not unique.
    generator : Generator
        What writes it.
    """

    name: str
    generator: Generator[Any, Any]

    @classmethod
    def of(cls, generator: Generator[Any, Any], name: str | None = None) -> Self:
        """The kernel that a generator writes, by default under its specification's name."""
        return cls(name or generator.isa.prefix + generator.spec.name, generator)

    @functools.cached_property
    def prim_func(self) -> PrimFunc:
        """The function; its arguments are those that :meth:`Generator.arguments` lists, in that order."""
        return self.generator.build(self.name)

    @property
    def declaration(self) -> PrimFunc:
        """A function with the same arguments and nothing in it, to call the kernel by where it is compiled elsewhere."""
        with tir.Function(self.name) as function:
            function.buffers(self.generator.arguments(tir.batch_extent(self.spec.batch)))
            tir.nothing()
        return function.result

    @property
    def spec(self) -> KernelSpec:
        """What it computes."""
        spec: KernelSpec = self.generator.spec
        return spec

    @property
    def machine(self) -> Machine:
        """What it is written for."""
        machine: Machine = self.generator.isa
        return machine

    @property
    def variant(self) -> str:
        """Instruction set, for the report."""
        return self.machine.name

    @property
    def operations(self) -> int:
        """Multiplications and additions for one sample; for kernels without a weight, bytes moved."""
        return self.spec.operations

    @property
    def bytes(self) -> int:
        """Bytes of inputs and outputs for one sample, plus the packed weight once."""
        return self.spec.moved_bytes(self.generator.weight_length)

    @property
    def unpacking(self) -> str:
        """Where weights below 8 bits become bytes; empty where the kernel reads bytes."""
        return self.generator.unpacking

    @property
    def remark(self) -> str:
        """What the report is to say of it; mostly nothing."""
        return self.generator.remark

    def pack_weight(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Bring integer weights into the order in which the kernel reads them.

        Parameters
        ----------
        weight : ndarray of int
            Shape ``spec.weight_shape``, zero point already subtracted.

        Returns
        -------
        ndarray of int8 or uint8, one-dimensional
            The packed weight, at 2, 4 or 8 bits a value.

        Raises
        ------
        CompileError
            If the kernel has no weight, or the weight does not fit into its bits.
        """
        return self.generator.pack_weight(np.asarray(weight))

    def compensation(self, weight: NDArray[Any]) -> NDArray[np.int32]:
        """The int32 argument that takes the zero point out of the sums.

        It is ``-zero_point * sum(weight)`` for each output channel, with the zero point as the kernel's instructions
        see it: where int8 activations are multiplied as uint8, that is 128 more.  `weight` is unpacked.
        """
        return self.generator.compensation(np.asarray(weight))
