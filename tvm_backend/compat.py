"""What differs from one TVM release to the next, and nowhere else, so that another release is one file's work.

Written for 0.27, the first with converters for all that the engine hands over. It made relax's constants, tuples and variables
classes of ``tvm.ir``; 0.26 had renamed relax's ``StructInfo`` to ``Type`` and ``.struct_info`` to ``.ty``.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax

__all__ = [
    "BUILDERS",
    "assert_structural_equal",
    "bound_values",
    "call_pure_packed",
    "call_with",
    "constant",
    "constant_value",
    "constants",
    "ffi_version",
    "function_names",
    "functions",
    "importer_arguments",
    "ints",
    "is_constant",
    "number",
    "op_name",
    "return_type",
    "same_shape",
    "same_size",
    "specialize_batch",
    "target_machine",
    "tensor_type",
    "tuple_fields",
    "tuple_type",
    "type_of",
    "variable_name",
    "with_functions",
]

BUILDERS = threading.RLock()
"""Held by whoever writes relax functions: TVM has one stack of open builders for all threads."""


def type_of(expr: Any) -> Any:
    """The relax type of an expression."""
    return expr.ty


def tensor_type(shape: Any, dtype: str) -> Any:
    """A tensor type; `shape` is a sequence of ints and symbolic variables."""
    return relax.TensorType(shape, dtype)


def tuple_type(fields: list[Any]) -> Any:
    """A tuple type."""
    return tvm.ir.TupleType(fields)


def tuple_fields(kind: Any) -> list[Any] | None:
    """The fields of a tuple type, or None for any other type."""
    fields = getattr(kind, "fields", None)
    return None if fields is None else list(fields)


def is_constant(expr: Any) -> bool:
    """Whether an expression is a tensor constant."""
    return isinstance(expr, tvm.ir.GenericConst)


def constant_value(expr: Any) -> np.ndarray:
    """The contents of a tensor constant."""
    return np.asarray(expr.value.numpy())


def constant(array: np.ndarray, dtype: str | None = None) -> Any:
    """A tensor constant with the contents of `array`; without a type, relax makes 32 bits of 64."""
    return relax.const(np.ascontiguousarray(array), dtype)


def call_pure_packed(name: str, args: list[Any], types: list[Any]) -> Any:
    """A relax call of a packed function known to have no side effects."""
    return relax.call_pure_packed(name, *args, ty_args=types)


def variable_name(var: Any) -> str:
    """The name of a relax variable."""
    return str(var.name)


def call_with(call: Any, args: list[Any]) -> Any:
    """A copy of a relax call with other arguments; `call` itself when they are the same."""
    if all(new.same_as(old) for new, old in zip(args, call.args, strict=True)):
        return call
    return relax.Call(call.op, args, call.attrs, call.ty_args)


def functions(mod: Any) -> list[tuple[Any, Any]]:
    """The functions of a module with their global variables."""
    return [(var, mod[var]) for var in mod.get_global_vars()]


def function_names(mod: Any) -> set[str]:
    """The names of a module's functions, in the module and in the library that it becomes."""
    symbols = [function.attrs.get("global_symbol") for _, function in functions(mod) if function.attrs]
    return {str(var.name_hint) for var in mod.get_global_vars()} | {str(name) for name in symbols if name}


def with_functions(mod: Any, changed: dict[Any, Any]) -> Any:
    """A copy of `mod` with some functions replaced or added."""
    copy = tvm.IRModule(dict(functions(mod)), attrs=mod.attrs)
    for var, function in changed.items():
        copy.update_func(var, function)
    return copy


def importer_arguments(converters: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``ExportedProgramImporter.from_exported_program``."""
    return {
        "keep_params_as_input": False,
        "unwrap_unit_return_tuple": True,
        "no_bind_return_tuple": False,
        "custom_convert_map": converters,
    }


def op_name(expr: Any) -> str:
    """The name of the relax operator that `expr` calls, without ``relax.``; empty for anything else."""
    if not isinstance(expr, relax.Call) or not isinstance(expr.op, tvm.ir.Op):
        return ""
    return str(expr.op.name).removeprefix("relax.")


def ints(values: Any) -> list[int]:
    """An attribute that is an array of integers, as Python ints."""
    return [int(value) for value in values]


def number(expr: Any) -> float:
    """The value of a relax scalar argument such as a bound of ``clip``."""
    value = getattr(expr, "value", expr)
    return float(getattr(value, "value", value))


def same_shape(left: Any, right: Any) -> bool:
    """Whether two tensors are known to have the same shape."""
    return bool(tvm_ffi.structural_equal(type_of(left).shape, type_of(right).shape))


def same_size(left: Any, right: Any) -> bool:
    """Whether two dimensions, numbers or symbolic, are known to be equal."""
    if isinstance(left, int) or isinstance(right, int):
        return bool(left is right or (isinstance(left, int) and isinstance(right, int) and left == right))
    return bool(tvm_ffi.structural_equal(left, right))


def bound_values(function: Any) -> list[Any]:
    """The expressions bound in a relax function, in order."""
    return [binding.value for block in function.body.blocks for binding in block.bindings]


def return_type(function: Any) -> Any:
    """The type of a relax function's result."""
    return function.ret_ty


def ffi_version() -> str:
    """The installed version of ``apache-tvm-ffi``."""
    return str(tvm_ffi.__version__)


def target_machine(target: Any) -> str:
    """The machine, as ``platform.machine()`` names it, that a target's triple stands for; empty when it has none."""
    return str(target.attrs.get("mtriple", "") or "").partition("-")[0]


def specialize_batch(mod: Any, sizes: Any) -> Any:
    """Add a copy of ``main`` for each batch size in `sizes`, named ``main_<size>``."""
    added = {}
    variable = None if not sizes else type_of(mod["main"].params[0]).shape.values[0]
    for size in sizes:
        alone = tvm.IRModule({"main": relax.utils.copy_with_new_vars(mod["main"])})
        bound = relax.transform.BindSymbolicVars({variable_name(variable): size}, "main")(alone)["main"]
        attributes = {**dict(bound.attrs), "global_symbol": f"main_{size}"}
        for name in ("tir_var_lower_bound", "tir_var_upper_bound"):
            attributes.pop(name, None)
        added[tvm.ir.GlobalVar(f"main_{size}")] = relax.Function(
            bound.params, bound.body, return_type(bound), True, tvm.ir.make_node("ir.DictAttrs", **attributes)
        )
    return with_functions(mod, added)


def assert_structural_equal(left: Any, right: Any) -> None:
    """Raise when two modules differ by more than names."""
    if not tvm_ffi.structural_equal(left, right, map_free_vars=True):
        raise AssertionError(f"modules differ:\n{left}\n---\n{right}")


def constants(mod: Any) -> list[np.ndarray]:
    """The contents of all tensor constants in the relax functions of a module, in order."""
    found: list[np.ndarray] = []

    def visit(expr: Any) -> None:
        if is_constant(expr):
            found.append(constant_value(expr))
        for part in list(getattr(expr, "args", ())) + list(getattr(expr, "fields", ())):
            visit(part)

    for _, function in functions(mod):
        if isinstance(function, relax.Function):
            for value in bound_values(function):
                visit(value)
    return found
