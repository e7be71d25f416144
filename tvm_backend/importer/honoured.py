"""Which arguments TVM's converters read: whatever else a program sets is refused, never dropped.

Read for TVM 0.27 in ``relax/frontend/torch`` (``exported_program_translator.py``, ``base_fx_graph_translator.py``), and each
operator compared with torch in the tests.  An operator that is not here has no converter, or one that is not right; then
:mod:`tvm_backend.importer.rewrites` has to express it by others.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from cat_plugin.errors import CompileError
from cat_plugin.torch_compat import OpOverload, schema_of

__all__ = ["HONOURED", "check", "where"]

_UNARY = [
    "abs",
    "acos",
    "acosh",
    "asin",
    "asinh",
    "atan",
    "atanh",
    "bitwise_not",
    "ceil",
    "cos",
    "cosh",
    "erf",
    "exp",
    "expm1",
    "floor",
    "isinf",
    "isnan",
    "log",
    "log2",
    "log10",
    "log1p",
    "logical_not",
    "neg",
    "reciprocal",
    "relu",
    "round",
    "rsqrt",
    "sigmoid",
    "sign",
    "sin",
    "sinh",
    "sqrt",
    "tan",
    "tanh",
    "trunc",
]
_BINARY = [
    "add.Tensor",
    "add.Scalar",
    "sub.Tensor",
    "mul.Tensor",
    "div.Tensor",
    "remainder.Tensor",
    "remainder.Scalar",
    "fmod.Tensor",
    "fmod.Scalar",
    "atan2.default",
    "maximum.default",
    "minimum.default",
    "eq.Tensor",
    "eq.Scalar",
    "ne.Tensor",
    "ne.Scalar",
    "lt.Tensor",
    "lt.Scalar",
    "le.Tensor",
    "le.Scalar",
    "gt.Tensor",
    "gt.Scalar",
    "ge.Tensor",
    "ge.Scalar",
    "bitwise_and.Tensor",
    "bitwise_or.Tensor",
    "bitwise_xor.Tensor",
    "bitwise_and.Scalar",
    "bitwise_or.Scalar",
    "bitwise_xor.Scalar",
    "logical_and.default",
    "logical_or.default",
    "logical_xor.default",
]

HONOURED: dict[str, str] = {
    **{f"{name}.default": "self" for name in _UNARY},
    **dict.fromkeys(_BINARY, "self other"),
    "pow.Tensor_Tensor": "self exponent",
    "pow.Tensor_Scalar": "self exponent",
    "pow.Scalar": "self exponent",
    "div.Tensor_mode": "self other rounding_mode",
    # Activations.
    "clamp.default": "self min max",
    "clamp.Tensor": "self min max",
    "elu.default": "self alpha",
    "gelu.default": "self approximate",
    "hardtanh.default": "self min_val max_val",
    "leaky_relu.default": "self negative_slope",
    "_softmax.default": "self dim",
    "_log_softmax.default": "self dim",
    "where.self": "condition self other",
    "bucketize.Tensor": "self boundaries out_int32 right",
    # Products.
    "addmm.default": "self mat1 mat2 beta alpha",
    "bmm.default": "self mat2",
    "mm.default": "self mat2",
    "convolution.default": "input weight bias stride padding dilation transposed output_padding groups",
    "embedding.default": "weight indices padding_idx scale_grad_by_freq sparse",
    # Normalization.
    "_native_batch_norm_legit_no_training.default": "input weight bias running_mean running_var momentum eps",
    "native_group_norm.default": "input weight bias N C HxW group eps",
    "native_layer_norm.default": "input normalized_shape weight bias eps",
    # Pooling.
    "avg_pool1d.default": "self kernel_size stride padding",
    "avg_pool2d.default": "self kernel_size stride padding",
    "avg_pool3d.default": "self kernel_size stride padding",
    "_adaptive_avg_pool2d.default": "self output_size",
    "_adaptive_avg_pool3d.default": "self output_size",
    "max_pool2d_with_indices.default": "self kernel_size stride padding dilation",
    "max_pool3d_with_indices.default": "self kernel_size stride padding dilation",
    # Reductions.
    "amax.default": "self dim keepdim",
    "amin.default": "self dim keepdim",
    "any.dim": "self dim keepdim",
    "any.dims": "self dim keepdim",
    "argmax.default": "self dim keepdim",
    "argmin.default": "self dim keepdim",
    "cumsum.default": "self dim dtype",
    "max.default": "self",
    "mean.default": "self dtype",
    "mean.dim": "self dim keepdim dtype",
    "min.default": "self",
    "prod.default": "self",
    "sum.dim_IntList": "self dim keepdim dtype",
    "sort.default": "self dim descending",
    "topk.default": "self k dim largest sorted",
    # Shapes and places.
    "cat.default": "tensors dim",
    "clone.default": "self",
    "alias.default": "self",
    "detach.default": "self",
    "constant_pad_nd.default": "self pad value",
    "diagonal.default": "self offset dim1 dim2",
    "expand.default": "self size",
    "flip.default": "self dims",
    "gather.default": "self dim index",
    "index_select.default": "self dim index",
    "permute.default": "self dims",
    "repeat.default": "self repeats",
    "scatter.src": "self dim index src",
    "scatter.value": "self dim index value",
    "slice.Tensor": "self dim start end step",
    "slice_scatter.default": "self src dim start end step",
    "unsqueeze.default": "self dim",
    "view.default": "self size",
    # Tensors made.
    "_to_copy.default": "self dtype",
    "lift_fresh_copy.default": "self",
    "_assert_tensor_metadata.default": "a size stride dtype",
    "arange.start_step": "start end step dtype",
    "full.default": "size fill_value dtype",
    "full_like.default": "self fill_value dtype",
    "scalar_tensor.default": "s dtype",
    "sym_size.int": "self dim",
}
"""The arguments that are honoured, by the operator's name without its namespace."""

_PLACES = frozenset(["memory_format", "layout", "device", "pin_memory", "non_blocking", "requires_grad"])
"""Arguments that say where numbers lie, not which they are."""

_OUTPUTS = {
    "_native_batch_norm_legit_no_training.default": 1,
    "max_pool2d_with_indices.default": 1,
    "max_pool3d_with_indices.default": 1,
    "native_group_norm.default": 1,
    "native_layer_norm.default": 1,
}
"""How many of an operator's results the converter computes, where it is not all of them."""


def where(node: fx.Node) -> str:
    """A few words on where in the model a node stands."""
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for entry in stack.values():
        path = entry[0] if isinstance(entry, tuple) else str(entry)
    path = path.removeprefix("L['self'].").removeprefix("L['self']")
    return f"node {node.name!r}" + (f" in module {path!r}" if path else "")


def _given(node: fx.Node) -> dict[str, tuple[Any, Any]]:
    """The arguments of a node that are not at their defaults: value and default by name."""
    found = {}
    for i, argument in enumerate(schema_of(node.target).arguments):
        if i < len(node.args):
            value = node.args[i]
        elif argument.name in node.kwargs:
            value = node.kwargs[argument.name]
        else:
            continue
        # What has no default is a tensor or a switch, and a switch that is off asks for nothing.
        default = argument.default_value if argument.has_default_value() else None
        off = not argument.has_default_value() and (value is False or value is None)
        plain = list(value) if isinstance(value, tuple | list) else value
        if not off and not _same(plain, default):
            found[argument.name] = (value, default)
    return found


def _same(value: Any, default: Any) -> bool:
    if isinstance(default, list) and isinstance(value, list) and default:
        return all(item == default[i % len(default)] for i, item in enumerate(value))
    return value is default or (
        type(value) in (int, float, bool, str, list, torch.dtype) and value == default
    )


def _results_used(node: fx.Node) -> int:
    """One more than the largest number of a result that something reads."""
    used = [int(user.args[1]) for user in node.users if user.target is operator.getitem]  # type: ignore[arg-type]
    return max(used, default=0) + 1


def check(node: fx.Node, ours: frozenset[str]) -> None:
    """Refuse a node that TVM's converter would not convert as it stands.

    Parameters
    ----------
    node : torch.fx.Node
        A call of a function.
    ours : frozenset of str
        Operators of other namespaces that have converters here, which read all arguments.

    Raises
    ------
    CompileError
        An argument, or a result, that the converter does not know; it names operator, argument and module.
    """
    name = getattr(node.target, "__name__", str(node.target))
    if name in ours or not isinstance(node.target, OpOverload):
        return
    honoured = HONOURED[name].split()
    for argument, (value, default) in _given(node).items():
        if argument not in honoured and argument not in _PLACES:
            raise CompileError(
                f"{node.target} ({where(node)}) has {argument}={value!r}, which the compiler does not know (it takes "
                f"{argument}={default!r} only). Express it by other operators, or keep that part outside of the compiled model"
            )
    known = _OUTPUTS.get(name)
    if known is not None and _results_used(node) > known:
        raise CompileError(
            f"{node.target} ({where(node)}): result {_results_used(node) - 1} is used, and the compiler computes only the "
            f"first {known}. Express it by other operators, or keep that part outside of the compiled model"
        )
