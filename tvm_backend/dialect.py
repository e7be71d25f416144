"""The symbolic operators that stand between the imported graph and its kernels.

A symbolic operator is a relax ``call_pure_packed`` of a name that starts with ``cat.`` whose last argument is a JSON
string.  So it prints, parses and compares in TVMScript, needs no registration, and means the same on every TVM release.
No library holds one: :mod:`tvm_backend.passes.lower_kernels` replaces each by a call of a PrimFunc.

- ``cat.quantize(x, QParams)``, ``cat.dequantize(q, QParams)``: per tensor;
- ``cat.quantize_per_channel(w, scales, zero_points, {"axis", "qmin", "qmax", "dtype"})`` and its inverse,
  ``cat.dequantize_per_channel``, of weights;
- ``cat.quantize_per_token(x, scales, zero_points, {"qmin", "qmax", "dtype"})``, its inverse ``cat.dequantize_per_token``, and
  ``cat.dequantize_rows(q, grid)``, whose grid holds scale and zero point of each row: of activations whose grids are computed;
- ``cat.kernel(data, ..., KernelSpec)``: an integer kernel, arguments as in :mod:`tvm_backend.kernels.spec`, but for
  convolutions and linear layers ``data, weight, scale, bias[, residual]`` with the weight unpacked;
- ``cat.cluster_affine(logits, ..., {"alpha": ...})`` and the other correction operators.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax

from cat_plugin.graph.manifest import corrections
from tvm_backend import compat
from tvm_backend.kernels import spec as specs
from tvm_backend.kernels.spec import Epilogue, EpilogueSpec, KernelSpec, QParams, storage_dtype

__all__ = [
    "CORRECTIONS",
    "SymbolicCall",
    "correction",
    "decode",
    "dequantize",
    "dequantize_per_channel",
    "dequantize_per_token",
    "dequantize_rows",
    "encode",
    "epilogue_of",
    "float_array",
    "kernel",
    "match",
    "match_dequantize",
    "match_kernel",
    "match_quantize",
    "quantize",
    "quantize_per_channel",
    "quantize_per_token",
    "shape_of",
    "static_batch",
    "with_epilogue",
]

CORRECTIONS = tuple(corrections())
"""The correction operators, by the name that follows ``cat::`` in torch and ``cat.`` here."""

_PREFIX = "cat."
_CLASSES = {
    name: getattr(specs, name)
    for name in dir(specs)
    if dataclasses.is_dataclass(getattr(specs, name)) and isinstance(getattr(specs, name), type)
}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **{name: _plain(item) for name, item in changed.items()}}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _rich(value: Any) -> Any:
    if isinstance(value, dict):
        fields = {name: _rich(item) for name, item in value.items() if name != "type"}
        return _CLASSES[value["type"]](**fields) if "type" in value else fields
    if isinstance(value, list):
        return tuple(_rich(item) for item in value)
    return value


def encode(attributes: Any) -> str:
    """Write a specification, or a mapping of plain values, as JSON."""
    if isinstance(attributes, dict):
        return json.dumps({name: _plain(item) for name, item in attributes.items()})
    return json.dumps(_plain(attributes))


def decode(text: str) -> Any:
    """Read what :func:`encode` wrote."""
    return _rich(json.loads(text))


@dataclass(frozen=True)
class SymbolicCall:
    """A symbolic operator, read: its name without prefix, its tensor arguments and its attributes."""

    name: str
    args: list[relax.Expr]
    attributes: Any


def shape_of(expr: relax.Expr) -> list[Any]:
    """The dimensions of a tensor expression: ints where they are known, else symbolic expressions."""
    return [int(d) if hasattr(d, "value") else d for d in compat.type_of(expr).shape.values]


def _call(name: str, args: list[relax.Expr], attributes: Any, types: list[Any]) -> relax.Expr:
    out = types[0] if len(types) == 1 else compat.tuple_type(types)
    return compat.call_pure_packed(_PREFIX + name, [*args, encode(attributes)], [out])


def match(expr: relax.Expr, *names: str) -> SymbolicCall | None:
    """Read `expr` as a symbolic operator with one of `names` (any name, when none is given)."""
    if not isinstance(expr, relax.Call) or getattr(expr.op, "name", "") != "relax.call_pure_packed":
        return None
    symbol = str(expr.args[0].global_symbol)
    if not symbol.startswith(_PREFIX):
        return None
    name = symbol.removeprefix(_PREFIX)
    if names and name not in names:
        return None
    return SymbolicCall(name, list(expr.args[1:-1]), decode(str(expr.args[-1].value)))


def match_quantize(expr: relax.Expr) -> tuple[relax.Expr, QParams] | None:
    """Read ``quantize(x, q)`` as ``(x, q)``."""
    call = match(expr, "quantize")
    return None if call is None else (call.args[0], call.attributes)


def match_dequantize(expr: relax.Expr) -> tuple[relax.Expr, QParams] | None:
    """Read ``dequantize(x, q)`` as ``(x, q)``."""
    call = match(expr, "dequantize")
    return None if call is None else (call.args[0], call.attributes)


def match_kernel(expr: relax.Expr, *kinds: type) -> SymbolicCall | None:
    """Read a kernel call whose specification is of one of `kinds` (any, when none is given)."""
    call = match(expr, "kernel")
    return None if call is None or (kinds and not isinstance(call.attributes, kinds)) else call


def quantize(x: relax.Expr, q: QParams) -> relax.Expr:
    """``cat.quantize``: float32 to integers, rounding half to even."""
    return _call("quantize", [x], q, [compat.tensor_type(shape_of(x), q.dtype)])


def dequantize(x: relax.Expr, q: QParams) -> relax.Expr:
    """``cat.dequantize``: integers to float32."""
    return _call("dequantize", [x], q, [compat.tensor_type(shape_of(x), "float32")])


def quantize_per_channel(
    x: relax.Expr, scales: relax.Expr, zero_points: relax.Expr, attributes: dict[str, Any]
) -> relax.Expr:
    """``cat.quantize_per_channel``: float32 to integers; `attributes` as for the inverse, with ``dtype``."""
    kind = compat.tensor_type(shape_of(x), attributes["dtype"])
    return _call("quantize_per_channel", [x, scales, zero_points], attributes, [kind])


def dequantize_per_channel(
    x: relax.Expr, scales: relax.Expr, zero_points: relax.Expr, attributes: dict[str, Any]
) -> relax.Expr:
    """``cat.dequantize_per_channel``: integers to float32 with one scale and zero point for each index of an axis.

    `attributes` holds ``axis``, ``qmin`` and ``qmax``.
    """
    kind = compat.tensor_type(shape_of(x), "float32")
    return _call("dequantize_per_channel", [x, scales, zero_points], attributes, [kind])


def quantize_per_token(
    x: relax.Expr, scales: relax.Expr, zero_points: relax.Expr, attributes: dict[str, Any]
) -> relax.Expr:
    """``cat.quantize_per_token``: (..., C) float32 to integers with the scales and zero points (..., 1) of tokens.

    `attributes` holds ``qmin``, ``qmax`` and ``dtype``.
    """
    kind = compat.tensor_type(shape_of(x), attributes["dtype"])
    return _call("quantize_per_token", [x, scales, zero_points], attributes, [kind])


def dequantize_per_token(
    x: relax.Expr, scales: relax.Expr, zero_points: relax.Expr, attributes: dict[str, Any]
) -> relax.Expr:
    """``cat.dequantize_per_token``: the inverse."""
    kind = compat.tensor_type(shape_of(x), "float32")
    return _call("dequantize_per_token", [x, scales, zero_points], attributes, [kind])


def dequantize_rows(x: relax.Expr, grid: relax.Expr) -> relax.Expr:
    """``cat.dequantize_rows``: the same of rows (N, C) with a grid (N, 2) of float32."""
    return _call("dequantize_rows", [x, grid], {}, [compat.tensor_type(shape_of(x), "float32")])


def correction(name: str, args: list[relax.Expr], alpha: float, features: bool) -> relax.Expr:
    """One of :data:`CORRECTIONS`; the result has the type of the logits, the first of `args`."""
    attributes = {"alpha": float(alpha), "features": features}
    return _call(name, args, attributes, [compat.type_of(args[0])])


def kernel(spec: KernelSpec, args: list[relax.Expr], batch: Any) -> relax.Expr:
    """``cat.kernel``: an integer kernel applied to `args`, for a batch of `batch` (an int or a symbolic variable)."""
    outputs = zip(spec.out_shapes, spec.out_kinds, strict=True)
    types = [compat.tensor_type([batch, *shape], storage_dtype(kind)) for shape, kind in outputs]
    return _call("kernel", args, spec, types)


def with_epilogue(spec: Any, **changes: Any) -> Any:
    """A copy of `spec` whose epilogue has `changes` made to it."""
    return dataclasses.replace(spec, epilogue=dataclasses.replace(spec.epilogue, **changes))


def epilogue_of(spec: KernelSpec) -> Epilogue | None:
    """The epilogue of a specification that has one."""
    return spec.epilogue if isinstance(spec, EpilogueSpec) else None


def static_batch(expr: relax.Expr) -> int | None:
    """The batch size of a tensor when it is known, which is what specifications ask for."""
    batch = shape_of(expr)[0]
    return batch if isinstance(batch, int) else None


def float_array(expr: relax.Expr) -> np.ndarray:
    """The contents of a constant as float32."""
    return compat.constant_value(expr).astype(np.float32)
