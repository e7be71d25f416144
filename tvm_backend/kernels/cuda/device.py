"""What only CUDA devices have, for the builder of kernels: threads, shared memory, barriers, device functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from tvm_backend.kernels import tir
from tvm_backend.kernels.tir import Expr

__all__ = [
    "barrier",
    "call",
    "emit",
    "exchanged",
    "fma",
    "local",
    "plus",
    "rounded",
    "shared",
    "store_pair",
    "threads",
    "times",
    "words",
]


@contextmanager
def threads(blocks: Sequence[Expr], count: int) -> Iterator[tuple[list[Expr], Expr]]:
    """A grid of blocks of `count` threads; gives the block's indices and the thread's."""
    frames = [T.launch_thread(f"blockIdx.{'xyz'[i]}", extent) for i, extent in enumerate(blocks)]
    indices = [frame.__enter__() for frame in frames]
    with T.launch_thread("threadIdx.x", count) as thread:
        yield indices, thread
    for frame in reversed(frames):
        frame.__exit__(None, None, None)


def shared(extent: int, dtype: str = "float32") -> Any:
    """An array in shared memory."""
    return tir.allocate((extent,), dtype, "shared")


def local(extent: int, dtype: str = "float32") -> Any:
    """Registers; indices must be constants."""
    return tir.allocate((extent,), dtype, "local")


def words(buffer: Any, count: Expr) -> Any:
    """The bytes of a buffer as `count` int32 words."""
    return T.decl_buffer((count,), "int32", data=buffer.data)


def barrier() -> None:
    """Wait for all threads of the block."""
    T.evaluate(T.tvm_storage_sync("shared"))


def call(dtype: str, name: str, *arguments: Expr) -> Expr:
    """A device function without side effects."""
    return T.call_pure_extern(dtype, name, *arguments)


def emit(name: str, *places: tuple[Any, Expr]) -> None:
    """Call a device function with the addresses of elements."""
    T.evaluate(T.call_extern("int32", name, *(T.address_of(buffer[index]) for buffer, index in places)))


def store_pair(buffer: Any, indices: Sequence[Expr], first: Expr, second: Expr) -> None:
    """Write two neighbouring elements at once, the first of which has an even place."""
    T.evaluate(
        T.call_extern(
            "int32", "cat_store2", T.address_of(tirx.BufferLoad(buffer, list(indices))), first, second
        )
    )


def fma(a: Expr, b: Expr, c: Expr) -> Expr:
    """``a * b + c`` in float32, rounded once."""
    return call("float32", "__fmaf_rn", a, b, c)


def plus(a: Expr, b: Expr) -> Expr:
    """A float32 sum that is never contracted with a product."""
    return call("float32", "__fadd_rn", a, b)


def times(a: Expr, b: Expr) -> Expr:
    """A float32 product that is rounded before it is used further."""
    return call("float32", "__fmul_rn", a, b)


def rounded(value: Expr) -> Expr:
    """float32 to int32, ties to even."""
    return call("int32", "__float2int_rn", value)


def exchanged(value: Expr, distance: int, dtype: str) -> Expr:
    """The value of the lane of the warp whose number differs in one bit."""
    return call(dtype, "__shfl_xor_sync", T.uint32(0xFFFFFFFF), value, distance)
