"""Writing CUDA kernels into TVM's IR builder: threads, shared memory, barriers, and arithmetic that rounds as agreed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from tvm_backend.kernels.cpu.ir import Argument, Expr

__all__ = [
    "Function",
    "all_of",
    "barrier",
    "call",
    "cast",
    "choose",
    "constant",
    "emit",
    "fma",
    "larger",
    "load",
    "local",
    "loop",
    "pick",
    "plus",
    "reinterpret",
    "rounded",
    "shared",
    "smaller",
    "store",
    "threads",
    "times",
    "when",
    "words",
]


class Function:
    """A PrimFunc being built; use as a context manager, then take :attr:`result`.

    Parameters
    ----------
    name : str
        The function's global symbol.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.result: Any = None
        self._builder = IRBuilder()
        self._frame: Any = None

    def __enter__(self) -> Function:
        self._builder.__enter__()
        self._frame = T.prim_func(s_tir=True, private=True)
        self._frame.__enter__()
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        return self

    def __exit__(self, *exception: Any) -> None:
        self._frame.__exit__(*exception)
        self._builder.__exit__(*exception)
        if exception[0] is None:
            self.result = self._builder.get().with_attr("global_symbol", self.name)

    def buffers(self, arguments: Sequence[Argument]) -> list[Any]:
        """Declare the arguments, each as (name, shape, dtype); return their buffers."""
        return [T.arg(name, T.buffer(tuple(shape), dtype)) for name, shape, dtype in arguments]


@contextmanager
def threads(blocks: Sequence[Expr], count: int) -> Iterator[tuple[list[Expr], Expr]]:
    """A grid of blocks of `count` threads; gives the block's indices and the thread's."""
    frames = [T.launch_thread(f"blockIdx.{'xyz'[i]}", extent) for i, extent in enumerate(blocks)]
    indices = [frame.__enter__() for frame in frames]
    with T.launch_thread("threadIdx.x", count) as thread:
        yield indices, thread
    for frame in reversed(frames):
        frame.__exit__(None, None, None)


def loop(extent: Expr) -> Any:
    """A serial loop."""
    return T.serial(0, extent)


@contextmanager
def when(condition: Expr) -> Iterator[None]:
    """Statements under a condition."""
    with T.If(condition), T.Then():
        yield


@contextmanager
def choose(condition: Expr) -> Iterator[tuple[Any, Any]]:
    """Two branches: ``with choose(c) as (then, otherwise): with then: ...; with otherwise: ...``."""
    with T.If(condition):
        yield T.Then(), T.Else()


def all_of(*conditions: Expr) -> Expr:
    """Logical and."""
    result = conditions[0]
    for condition in conditions[1:]:
        result = tirx.And(result, condition)
    return result


def shared(extent: int, dtype: str) -> Any:
    """An array in shared memory."""
    return T.alloc_buffer((extent,), dtype, scope="shared")


def local(extent: int, dtype: str) -> Any:
    """Registers; indices must be constants."""
    return T.alloc_buffer((extent,), dtype, scope="local")


def words(buffer: Any, count: Expr) -> Any:
    """The bytes of a buffer as `count` int32 words."""
    return T.decl_buffer((count,), "int32", data=buffer.data)


def barrier() -> None:
    """Wait for all threads of the block."""
    T.evaluate(T.tvm_storage_sync("shared"))


def _indices(indices: Sequence[Expr], lanes: int) -> list[Expr]:
    return list(indices) if lanes == 1 else [*indices[:-1], T.ramp(indices[-1], 1, lanes)]


def load(buffer: Any, indices: Sequence[Expr], lanes: int = 1) -> Expr:
    """Read consecutive elements along the last axis."""
    return tirx.BufferLoad(buffer, _indices(indices, lanes))


def store(buffer: Any, value: Expr, indices: Sequence[Expr], lanes: int = 1) -> None:
    """Write consecutive elements along the last axis."""
    T.buffer_store(buffer, value, _indices(indices, lanes))


def constant(value: float, dtype: str) -> Expr:
    """A scalar constant."""
    return tirx.const(value, dtype)


def cast(value: Expr, dtype: str) -> Expr:
    """Convert a scalar."""
    return tirx.Cast(dtype, value)


def reinterpret(dtype: str, value: Expr) -> Expr:
    """The same bits as another type."""
    return T.reinterpret(dtype, value)


def call(dtype: str, name: str, *arguments: Expr) -> Expr:
    """A device function without side effects."""
    return T.call_pure_extern(dtype, name, *arguments)


def emit(name: str, *places: tuple[Any, Expr]) -> None:
    """Call a device function with the addresses of elements."""
    T.evaluate(T.call_extern("int32", name, *(T.address_of(buffer[index]) for buffer, index in places)))


def pick(condition: Expr, if_true: Expr, if_false: Expr) -> Expr:
    """One of two values; only that one is computed."""
    return T.if_then_else(condition, if_true, if_false)


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


def larger(a: Expr, b: Expr) -> Expr:
    """The larger of two values."""
    return T.max(a, b)


def smaller(a: Expr, b: Expr) -> Expr:
    """The smaller of two values."""
    return T.min(a, b)
