"""From an exported program to a graph in which nothing writes into a tensor.

Views, aliases and slices that are assigned to are values like any others then.
"""

from __future__ import annotations

import torch
from torch import fx

from cat_plugin.errors import QuantizationError
from cat_plugin.ptq.graph.ops import is_call, operand
from cat_plugin.torch_compat import schema_of

__all__ = ["DROPOUTS", "functional"]

_aten = torch.ops.aten

#: What does nothing in evaluation mode but hand on what it is given.
DROPOUTS = frozenset(
    {
        _aten.dropout.default,
        _aten.dropout_.default,
        _aten.feature_dropout.default,
        _aten.alpha_dropout.default,
        _aten.feature_alpha_dropout.default,
    }
)
#: Operations that write over their first argument, and those that return a tensor of its own instead.
_IN_PLACE = {
    getattr(_aten, f"{name}_").default: getattr(_aten, name).default
    for name in ("elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish", "relu", "relu6", "sigmoid", "silu", "tanh")
} | {getattr(_aten, f"{name}_").Tensor: getattr(_aten, name).Tensor for name in ("add", "sub", "mul", "div")}  # fmt: skip
#: Operations whose result is a tensor of its own, never one that they were given.
_FRESH = frozenset(_IN_PLACE.values()) | {
    _aten.conv1d.default,
    _aten.conv2d.default,
    _aten.conv2d.padding,
    _aten.conv3d.default,
    _aten.linear.default,
    _aten.batch_norm.default,
}


def _writes(node: fx.Node) -> bool:
    schema = schema_of(node.target)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def _uses_batch_statistics(node: fx.Node) -> bool:
    """BatchNorm in training mode writes into its running statistics, although its schema does not say so."""
    return is_call(node, {_aten.batch_norm.default}) and node.args[5] is not False


def _is_transform(node: fx.Node) -> bool:
    """A step of what :func:`torch.vmap` does, which works on live tensors alone."""
    return node.op == "call_function" and str(getattr(node.target, "__module__", "")).startswith(
        "torch._functorch"
    )


def _hand_on(module: fx.GraphModule) -> None:
    """Dropout in evaluation mode is what it is given, into which may be written: to make a program functional, torch copies it."""
    for node in module.graph.nodes:
        if is_call(node, DROPOUTS) and node.args[2] is False:
            node.target, node.args = _aten.alias.default, node.args[:1]


def _write_elsewhere(module: fx.GraphModule) -> None:
    """Activations and sums in place, of what nothing else reads, return a tensor of their own instead.

    Of most networks these are all writes, and to make a program functional takes longer than to export it.
    """
    for node in module.graph.nodes:
        if not is_call(node, _IN_PLACE):
            continue
        given = operand(node)
        types = {each.meta["val"].dtype for each in node.all_input_nodes}
        if is_call(given, _FRESH) and set(given.users) == {node} and len(types) == 1:
            node.target = _IN_PLACE[node.target]


def functional(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The program's graph as a module, with nothing in it that writes into a tensor.

    Raises
    ------
    QuantizationError
        If an operation remains that does.
    """
    _hand_on(program.graph_module)
    _write_elsewhere(program.graph_module)
    program.graph_module.recompile()
    if any(
        _writes(node) or _uses_batch_statistics(node) or _is_transform(node) for node in program.graph.nodes
    ):
        program = program.run_decompositions({})
    module = program.module(check_guards=False)
    for node in reversed(module.graph.nodes):
        # what the program leaves behind in its input or its buffers; nobody reads it after the call
        if is_call(node, {_aten.copy_.default}) and node.args[0].op in ("placeholder", "get_attr"):
            node.replace_all_uses_with(node.args[1])
            module.graph.erase_node(node)
    left = next((node for node in module.graph.nodes if _writes(node)), None)
    if left is not None:
        raise QuantizationError(
            f"the model writes into a tensor by {left.target}, which cannot be expressed as a function of its inputs; "
            "replace it by an operation that returns a new tensor."
        )
    return module
