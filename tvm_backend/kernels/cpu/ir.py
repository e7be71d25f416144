"""What only processors have, for the builder of kernels: registers, and LLVM's intrinsics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from tvm_backend.kernels import tir
from tvm_backend.kernels.tir import Expr

__all__ = [
    "Registers",
    "address",
    "call",
    "fence",
    "flip_sign",
    "fma",
    "hold",
    "part",
    "prefetch",
    "round_to_int",
]


class Registers:
    """Values that LLVM keeps in registers, if they are not too many.

    Each is a buffer of its own, which TVM puts on the stack and LLVM then promotes; one buffer for all would come
    from the memory pool as soon as it exceeds a kilobyte, and be written back there.

    Parameters
    ----------
    count : int
        How many values.
    dtype : str
        Type of a lane.
    lanes : int
        Lanes of a value.
    """

    def __init__(self, count: int, dtype: str, lanes: int) -> None:
        # Not one element of a vector type: TVM may let buffers share memory, and checks that their lanes agree.
        self._slots = [tir.allocate((lanes,), dtype) for _ in range(count)]
        self._lanes = lanes

    def __getitem__(self, index: int) -> Expr:
        return tir.load(self._slots[index], [0], self._lanes)

    def __setitem__(self, index: int, value: Expr) -> None:
        tir.store(self._slots[index], value, [0], self._lanes)


def address(buffer: Any, indices: Sequence[Expr]) -> Expr:
    """A pointer to an element, for instructions that read or write memory themselves."""
    return T.address_of(tirx.BufferLoad(buffer, list(indices)))


def prefetch(buffer: Any, indices: Sequence[Expr]) -> None:
    """Ask for the cache line of an element, which must exist, to be read soon."""
    read, keep, data = (tirx.const(number, "int32") for number in (0, 3, 1))
    T.evaluate(call("void", "llvm.prefetch", address(buffer, indices), read, keep, data))


def part(value: Expr, start: int, lanes: int) -> Expr:
    """Some consecutive lanes of a vector."""
    return tir.shuffle([value], range(start, start + lanes))


def hold(value: Expr, dtype: str, lanes: int) -> Expr:
    """Compute a value once and read it often: expressions are trees, in which it would be computed each time."""
    held = Registers(1, dtype, lanes)
    held[0] = value
    return held[0]


def flip_sign(value: Expr, dtype: str, lanes: int = 1) -> Expr:
    """int8 as uint8 offset by 128, or uint8 as int8 offset by -128: the highest bit turned."""
    turned = tir.reinterpret(tir.vector("uint8", lanes), value) ^ tir.constant(128, "uint8", lanes)
    return turned if dtype == "int8" else tir.reinterpret(tir.vector("int8", lanes), turned)


def call(dtype: str, name: str, *arguments: Expr) -> Expr:
    """Call an LLVM intrinsic by name."""
    return T.call_llvm_intrin(dtype, name, *arguments)


def fma(a: Expr, b: Expr, c: Expr, lanes: int) -> Expr:
    """``a * b + c`` in float32 with one rounding, on every target."""
    return call(tir.vector("float32", lanes), "llvm.fma", a, b, c)


def fence(value: Expr, lanes: int) -> Expr:
    """A float32 value that is rounded before it is used further."""
    return call(tir.vector("float32", lanes), "llvm.arithmetic.fence", value)


def round_to_int(value: Expr, lanes: int) -> Expr:
    """float32 to int32, ties to even."""
    return call(tir.vector("int32", lanes), "llvm.lrint", value)
