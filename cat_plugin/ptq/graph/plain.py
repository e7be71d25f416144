"""From a functional graph to the one that the engine reads: one name and one spelling for each thing.

What depends on parameters alone is computed once.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from cat_plugin.ptq.graph.functional import DROPOUTS
from cat_plugin.ptq.graph.ops import arguments, is_call, operand, output_leaves

__all__ = ["fold_constants", "plain", "select_by_number"]

_aten = torch.ops.aten

#: Operations that hand on their first argument, or check it, and change nothing in evaluation mode.
_IDENTITY = DROPOUTS | frozenset(
    {
        _aten.alias.default,
        _aten.detach.default,
        _aten.lift_fresh_copy.default,
    }
)
_CHECKS = frozenset(
    {_aten._assert_tensor_metadata.default, _aten._assert_async.msg, _aten._assert_scalar.default}
)
#: Operations that make a tensor of numbers alone, as tables of positions are made.
_CREATIONS = frozenset(
    {
        _aten.arange.default,
        _aten.arange.start,
        _aten.arange.start_step,
        _aten.full.default,
        _aten.ones.default,
        _aten.zeros.default,
    }
)
#: What leaves memory as it finds it, and what writes zeros there: what nobody reads must come out the same at every run.
_UNWRITTEN = {
    _aten.empty.memory_format: _aten.zeros.default,
    _aten.new_empty.default: _aten.new_zeros.default,
    _aten.empty_like.default: _aten.zeros_like.default,
}
_NORM = _aten._native_batch_norm_legit_no_training.default


def select_by_number(module: fx.GraphModule) -> int:
    """Write selections by constant masks, and repetitions by tables of constants, as selections by number, in place.

    Those have sizes that are known.

    Returns
    -------
    int
        Number of operations replaced.
    """
    replaced = 0
    for node in module.graph.nodes:
        if is_call(node, {_aten.repeat_interleave.self_Tensor}) and len(node.args) > 2:
            table = _table(module, operand(node, 1))
            if table is None or table.numel() < 2:
                continue
            (places,) = _places(module, node, (torch.repeat_interleave(table),))
            node.target, node.args = _aten.index_select.default, (node.args[0], node.args[2], places)
        elif is_call(node, {_aten.index.Tensor}):
            tables = [None if index is None else _table(module, index) for index in arguments(node)[1]]
            if not any(table is not None and table.dtype == torch.bool for table in tables):
                continue
            indices: list[Any] = []
            for index, table in zip(arguments(node)[1], tables, strict=True):
                if table is not None and table.dtype == torch.bool:
                    indices += _places(module, node, table.nonzero(as_tuple=True))
                else:
                    indices.append(index)
            node.args = (node.args[0], indices)
        else:
            continue
        replaced += 1
    module.recompile()
    return replaced


def _table(module: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """The constant that a node hands on; None if it is computed."""
    while is_call(node, _IDENTITY) or _is_copy(node):
        node = operand(node)
    found = operator.attrgetter(str(node.target))(module) if node.op == "get_attr" else None
    return found if isinstance(found, Tensor) else None


def _places(module: fx.GraphModule, node: fx.Node, numbers: tuple[Tensor, ...]) -> list[fx.Node]:
    """Constants of the module, read in front of a node."""
    made = []
    for axis, each in enumerate(numbers):
        name = f"_places_{node.name}_{axis}"
        module.register_buffer(name, each)
        with module.graph.inserting_before(node):
            made.append(module.graph.get_attr(name))
    return made


def plain(module: fx.GraphModule) -> fx.GraphModule:
    """Copy into a graph module of ours: tensors in, tensors out, unique names, no dead or identity nodes."""
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    root = nn.Module()
    names: dict[str, str] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            leaves = [
                env[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in output_leaves(module.graph)
            ]
            graph.output(leaves[0] if len(leaves) == 1 else tuple(leaves))
        elif node.op == "placeholder" and not isinstance(node.meta.get("val"), Tensor):
            continue  # of an argument that is no tensor, whose value the exporter has written into the graph
        elif is_call(node, _CHECKS):
            continue
        elif is_call(node, _IDENTITY) or _is_copy(node) or _is_whole_slice(node) or _is_same_type(node):
            env[node] = env[node.args[0]]
        elif is_call(node, {_aten.copy.default}):
            env[node] = _copied(graph, node, env)
        elif is_call(node, {_aten.addcmul.default}):
            env[node] = _product_added(graph, node, env)
        elif node.op == "get_attr":
            env[node] = _attribute(module, node, root, graph, names)
        elif is_call(node, {_NORM}):
            x, weight, bias, mean, var, momentum, eps = fx.map_arg(node.args, lambda n: env[n])
            args = (x, weight, bias, mean, var, False, momentum, eps, True)
            env[node] = graph.call_function(_aten.batch_norm.default, args)
            env[node].meta = {**node.meta, "val": node.meta["val"][0]}
        elif (slope := _mean_slope(node)) is not None:
            env[node] = graph.call_function(_aten.leaky_relu.default, (env[operand(node)], slope))
            env[node].meta = {**node.meta, "val": node.meta["val"][0]}
        elif is_call(node, {operator.getitem}) and (
            is_call(node.args[0], {_NORM}) or _mean_slope(node.args[0]) is not None
        ):
            if node.args[1] == 0:
                env[node] = env[node.args[0]]
        else:
            env[node] = graph.node_copy(node, lambda n: env[n])
            _written(env[node])
            _free_of_layout(env[node])
            _static_sizes(env[node])
    result = fx.GraphModule(root, graph)
    result.graph.eliminate_dead_code()
    result.recompile()
    return result.eval()


def _copied(graph: fx.Graph, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    """What is assigned, in the shape and of the type of what it is assigned to; `copy` itself has no gradient."""
    given, source = (operand(node, i).meta["val"] for i in (0, 1))
    result = env[operand(node, 1)]
    if source.dtype != given.dtype:
        result = graph.call_function(_aten.to.dtype, (result, given.dtype))
        result.meta = {**node.meta, "val": source.to(given.dtype)}
    if source.shape != given.shape:
        result = graph.call_function(_aten.expand_as.default, (result, env[operand(node, 0)]))
        result.meta = dict(node.meta)
    return result


def _product_added(graph: fx.Graph, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    """``addcmul`` as a product and a sum: in the engine's own graphs that operation is a transform."""
    left, right = operand(node, 1), operand(node, 2)
    product = graph.call_function(_aten.mul.Tensor, (env[left], env[right]))
    product.meta = {**node.meta, "val": left.meta["val"] * right.meta["val"]}
    value = node.kwargs.get("value", 1)
    result = graph.call_function(
        _aten.add.Tensor, (env[operand(node)], product), {} if value == 1 else {"alpha": value}
    )
    result.meta = dict(node.meta)
    return result


def _mean_slope(node: fx.Node) -> float | None:
    """Slope below zero of what :func:`torch.nn.functional.rrelu` becomes where it is written in place; None of others."""
    if not is_call(node, {_aten.rrelu_with_noise_functional.default}):
        return None
    given = arguments(node)[2:5]
    given += (0.125, 1 / 3, False)[len(given) :]
    lower, upper, training = given
    return None if training else float(lower + upper) / 2


def _written(node: fx.Node) -> None:
    """Zeros in memory that is taken as it is found."""
    if node.op == "call_function" and node.target in _UNWRITTEN:
        node.target = _UNWRITTEN[node.target]
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "memory_format"}


def _is_copy(node: fx.Node) -> bool:
    """A copy in the same layout, of which nobody can tell the original where nothing is written into."""
    return is_call(node, {_aten.clone.default}) and not node.kwargs


def _is_whole_slice(node: fx.Node) -> bool:
    """``x[:]``."""
    if not is_call(node, {_aten.slice.Tensor}) or len(node.args) > 4:
        return False
    start, end = (*node.args[2:], None, None)[:2]
    return start in (0, None) and (end is None or (isinstance(end, int) and end >= 2**62))


def _is_same_type(node: fx.Node) -> bool:
    """A conversion to the type that its operand has already."""
    if not is_call(node, {_aten.to.dtype, _aten._to_copy.default, _aten.to.dtype_layout}):
        return False
    before, after = operand(node).meta["val"], node.meta["val"]
    return bool(before.dtype == after.dtype and before.device == after.device)


def _attribute(
    module: fx.GraphModule, node: fx.Node, root: nn.Module, graph: fx.Graph, names: dict[str, str]
) -> fx.Node:
    """Copy what a ``get_attr`` node reads to the root, under a name that nothing else has."""
    target = str(node.target)
    if target not in names:
        name = target.replace(".", "_")
        while name in names.values() or hasattr(root, name):  # a.b_conv and a_b.conv are two
            name += "_"
        names[target] = name
        value: object = module
        for part in target.split("."):
            value = getattr(value, part)
        if isinstance(value, Tensor):
            root.register_buffer(name, value.detach().clone().contiguous())
        else:
            setattr(root, name, copy.deepcopy(value))
    new = graph.create_node("get_attr", names[target])
    new.meta = {**node.meta, "source": target}
    return new


def _free_of_layout(node: fx.Node) -> None:
    """A view is refused where its operand's memory is laid out otherwise, as what takes an operation's place may leave it."""
    if is_call(node, {_aten.view.default, _aten._unsafe_view.default}):
        node.target = _aten.reshape.default


def _static_sizes(node: fx.Node) -> None:
    """Write -1 for the one symbolic size of a reshape, so that no symbol flows through the graph."""
    if not is_call(node, {_aten.reshape.default}):
        return
    shape = node.meta["val"].shape
    symbolic = [i for i, size in enumerate(shape) if not isinstance(size, int)]
    if len(symbolic) <= 1:
        node.args = (node.args[0], [-1 if i in symbolic else int(size) for i, size in enumerate(shape)])


def fold_constants(module: fx.GraphModule) -> int:
    """Compute what depends on parameters and numbers alone, in place.

    Weight norm, spectral norm, weight standardisation, ``weight * 0.5`` and ``parameter.exp()`` become one tensor each,
    which is then quantized like any other weight; the tables of rotary positions become constants.

    Parameters
    ----------
    module : fx.GraphModule
        From :func:`plain`.

    Returns
    -------
    int
        Number of tensors computed.
    """
    graph = module.graph
    constant: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            constant[node] = getattr(module, str(node.target))
        elif (
            node.op == "call_function"
            and (node.all_input_nodes or node.target in _CREATIONS)
            and all(n in constant for n in node.all_input_nodes)
        ):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: constant[n])
            with torch.no_grad():
                constant[node] = node.target(*args, **kwargs)
    folded = 0
    for node in list(graph.nodes):
        if node not in constant or node.op == "get_attr" or not isinstance(constant[node], Tensor):
            continue
        if all(user in constant for user in node.users):
            continue
        name = f"_constant_{node.name}"
        module.register_buffer(name, constant[node].detach().clone().contiguous())
        with graph.inserting_before(node):
            new = graph.create_node("get_attr", name)
        new.meta = {**node.meta, "source": _owner(node)}
        node.replace_all_uses_with(new)
        folded += 1
    graph.eliminate_dead_code()
    module.recompile()
    return folded


def _owner(node: fx.Node) -> str:
    """Name of the user's module whose parameters went into a computed tensor, or the node's own."""
    sources = [str(n.meta["source"]) for n in node.all_input_nodes if "source" in n.meta]
    return sources[0] if sources else node.name
