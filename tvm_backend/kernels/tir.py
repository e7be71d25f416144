"""The builder in which all kernels are written: a thin layer over TVM's.

Generators are Python code that unrolls register tiles, which TVMScript's parser cannot express; what they need of TVM's
builder on every machine is here.  What only processors have is in :mod:`tvm_backend.kernels.cpu.ir`, what only CUDA
devices have in :mod:`tvm_backend.kernels.cuda.device`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from tvm_backend import compat
from tvm_backend.kernels.spec import Argument

__all__ = [
    "Expr",
    "Function",
    "all_of",
    "allocate",
    "batch_extent",
    "branch",
    "broadcast",
    "cast",
    "choose",
    "constant",
    "dtype_of",
    "either",
    "exp",
    "float32",
    "if_else",
    "int32",
    "is_nan",
    "larger",
    "least",
    "load",
    "loop",
    "nothing",
    "parallel",
    "ramp",
    "reinterpret",
    "select",
    "shuffle",
    "smaller",
    "sqrt",
    "store",
    "unrolled",
    "vector",
    "vectorized",
    "when",
]

Expr = Any
"""A TIR expression, or a Python number where a constant will do."""


class Function:
    """A PrimFunc being built; use as a context manager, then take :attr:`result`.

    Parameters
    ----------
    name : str, optional
        The function's global symbol; a private function needs none.
    private : bool, optional
        Whether relax alone calls it, by ``call_tir``: then its arguments are buffers, and TVM's passes for schedulable
        functions, which know threads and shared memory, apply.
    **attributes
        Further attributes of the function.
    """

    def __init__(self, name: str = "", *, private: bool = False, **attributes: Any) -> None:
        self.name, self.private, self.attributes = name, private, attributes
        self.result: tirx.PrimFunc | None = None
        self._builder = IRBuilder()
        self._frame: Any = None

    def __enter__(self) -> Function:
        self._builder.__enter__()
        self._frame = T.prim_func(s_tir=True, private=True) if self.private else T.prim_func(s_tir=False)
        self._frame.__enter__()
        # Relax leaves a function with this attribute alone: its loops are scheduled already.
        attributes = {"tirx.noalias": True, "tirx.is_scheduled": True, **self.attributes}
        if not self.private:
            T.func_name(self.name)
            attributes = {"global_symbol": self.name, **attributes}
        T.func_attr(attributes)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._frame.__exit__(*exception)
        self._builder.__exit__(*exception)
        if exception[0] is None:
            result = self._builder.get()
            self.result = result.with_attr("global_symbol", self.name) if self.name else result

    def buffers(self, arguments: Sequence[Argument]) -> list[Any]:
        """Declare the arguments, each as (name, shape, dtype); return their buffers."""
        if self.private:
            return [T.arg(name, T.buffer(tuple(shape), dtype)) for name, shape, dtype in arguments]
        handles = [T.arg(name, T.handle()) for name, _, _ in arguments]
        return [
            T.match_buffer(handle, tuple(shape), dtype)
            for handle, (_, shape, dtype) in zip(handles, arguments, strict=True)
        ]


def batch_extent(batch: int | None) -> Expr:
    """The batch dimension: the number itself, or a new symbolic variable."""
    return batch if batch is not None else tirx.Var("n", "int64")


# Statements.


def nothing() -> None:
    """The body of a function that is a declaration only."""
    T.evaluate(tirx.const(0, "int32"))


def loop(extent: Expr) -> Any:
    """A serial loop over ``range(extent)``; ``with loop(8) as i``."""
    return T.serial(0, extent)


def parallel(extent: Expr) -> Any:
    """A loop whose iterations are shared among the threads."""
    return T.parallel(0, extent)


def unrolled(extent: int) -> Any:
    """A loop whose iterations are written one behind the other."""
    return T.unroll(0, extent)


def vectorized(lanes: int) -> Any:
    """A loop whose iterations are the lanes of vectors."""
    return T.vectorized(0, lanes)


@contextmanager
def when(condition: Expr) -> Iterator[None]:
    """Statements under a condition, which may not be known to be false."""
    if condition is True:
        yield
        return
    with T.If(condition), T.Then():
        yield


@contextmanager
def choose(condition: Expr) -> Iterator[tuple[Any, Any]]:
    """Two branches: ``with choose(c) as (then, otherwise): with then: ...; with otherwise: ...``."""
    with T.If(condition):
        yield T.Then(), T.Else()


def branch(condition: Expr, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    """Emit one of two statements where the condition is known, both under an if where it is not."""
    if isinstance(condition, bool):
        then() if condition else otherwise()
        return
    with choose(condition) as (if_true, if_false):
        with if_true:
            then()
        with if_false:
            otherwise()


def allocate(shape: int | Sequence[int], dtype: str, scope: str = "global") -> Any:
    """Working memory of the innermost loop around it; on a processor on the stack below a kilobyte, else from the pool."""
    return T.alloc_buffer(shape, dtype, scope=scope)


def _indices(indices: Sequence[Expr], lanes: int) -> list[Expr]:
    if lanes == 1:
        return list(indices)
    return [*indices[:-1], ramp(indices[-1], lanes)]


def load(buffer: Any, indices: Sequence[Expr], lanes: int = 1) -> Expr:
    """Read `lanes` consecutive elements along the last axis."""
    return tirx.BufferLoad(buffer, _indices(indices, lanes))


def store(buffer: Any, value: Expr, indices: Sequence[Expr], lanes: int = 1) -> None:
    """Write `lanes` consecutive elements along the last axis."""
    T.buffer_store(buffer, value, _indices(indices, lanes))


# Expressions.


def vector(dtype: str, lanes: int) -> str:
    """The name of a vector type; a scalar for one lane."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def constant(value: float, dtype: str, lanes: int = 1) -> Expr:
    """A scalar constant, repeated `lanes` times."""
    return broadcast(tirx.const(value, dtype), lanes)


def float32(value: float) -> Expr:
    """A float32 constant."""
    return tirx.const(value, "float32")


def int32(value: int) -> Expr:
    """An int32 constant."""
    return tirx.const(value, "int32")


def broadcast(value: Expr, lanes: int) -> Expr:
    """A scalar repeated `lanes` times."""
    return value if lanes == 1 else T.broadcast(value, lanes)


def ramp(first: Expr, lanes: int) -> Expr:
    """The indices from `first` on, as a vector."""
    return T.ramp(first, 1, lanes)


def shuffle(values: Sequence[Expr], order: Sequence[int]) -> Expr:
    """Lanes of several vectors, numbered through, in another order."""
    return tirx.Shuffle(list(values), [tirx.const(i, "int32") for i in order])


def dtype_of(value: Expr) -> str:
    """The element type of an expression, without its lanes."""
    return str(compat.type_of(value)).partition("x")[0]


def cast(value: Expr, dtype: str, lanes: int = 1) -> Expr:
    """Convert every lane."""
    return tirx.Cast(vector(dtype, lanes), value)


def reinterpret(dtype: str, value: Expr) -> Expr:
    """The same bits as another type of the same size."""
    return T.reinterpret(dtype, value)


def all_of(*conditions: Expr) -> Expr:
    """Logical and."""
    result = conditions[0]
    for condition in conditions[1:]:
        result = tirx.And(result, condition)
    return result


def either(a: Expr, b: Expr) -> Expr:
    """Logical or."""
    return tirx.Or(a, b)


def larger(a: Expr, b: Expr) -> Expr:
    """The larger of two values, lane by lane."""
    return T.max(a, b)


def smaller(a: Expr, b: Expr) -> Expr:
    """The smaller of two values, lane by lane."""
    return T.min(a, b)


def least(a: Expr, b: Expr) -> Expr:
    """The smaller of two indices; a number where both are known."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else smaller(a, b)


def exp(value: Expr) -> Expr:
    """The exponential function."""
    return T.exp(value)


def sqrt(value: Expr) -> Expr:
    """The square root."""
    return T.sqrt(value)


def is_nan(value: Expr) -> Expr:
    """Whether a value is not a number, lane by lane."""
    return T.isnan(value)


def select(condition: Expr, if_true: Expr, if_false: Expr) -> Expr:
    """One of two values, both computed."""
    return tirx.Select(condition, if_true, if_false)


def if_else(condition: Expr, if_true: Expr, if_false: Expr) -> Expr:
    """One of two values; only that one is computed."""
    return T.if_then_else(condition, if_true, if_false)
