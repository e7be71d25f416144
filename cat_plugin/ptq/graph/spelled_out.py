"""Functions that a model spells out in arithmetic, written as the one operation that they are.

Left in pieces, each piece would be quantized by itself, and what is far from linear suffers: the squares inside a layer norm,
or the cube inside a GELU, need a range so wide that 8 bits hold nothing of its middle.  They are found by what they compute,
not by how they are written: a stretch of arithmetic on one tensor is run on numbers and compared with the functions known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from cat_plugin.ptq.graph.norms import Norm, norm_of
from cat_plugin.ptq.graph.ops import constant, is_call

__all__ = ["join_pieces"]

_aten = torch.ops.aten

#: Arithmetic by value, of one tensor and numbers or of two tensors.
_PIECES = frozenset(
    {
        _aten.add.Tensor, _aten.sub.Tensor, _aten.rsub.Scalar, _aten.mul.Tensor, _aten.div.Tensor, _aten.neg.default,
        _aten.pow.Tensor_Scalar, _aten.square.default, _aten.sqrt.default, _aten.rsqrt.default,
        _aten.reciprocal.default, _aten.exp.default, _aten.log.default, _aten.log1p.default, _aten.tanh.default,
        _aten.erf.default, _aten.sigmoid.default, _aten.softplus.default, _aten.relu.default, _aten.relu6.default,
        _aten.hardtanh.default, _aten.hardsigmoid.default, _aten.clamp.default, _aten.clamp_min.default,
        _aten.clamp_max.default, _aten.minimum.default, _aten.maximum.default,
    }
)  # fmt: skip
_REDUCTIONS = frozenset(
    {
        _aten.mean.dim, _aten.sum.dim_IntList, _aten.amax.default, _aten.var.correction, _aten.var.dim,
        _aten.std.correction, _aten.std.dim,
    }
)  # fmt: skip
#: How a reduced tensor is brought back to the shape of what it came from.
_SHAPES = frozenset(
    {
        _aten.reshape.default, _aten.view.default, _aten.expand.default, _aten.squeeze.dims, _aten.squeeze.dim,
        _aten.unsqueeze.default,
    }
)  # fmt: skip
_ALL = _PIECES | _REDUCTIONS | _SHAPES
#: What the last piece can be.
_ENDS = frozenset(
    {
        _aten.mul.Tensor, _aten.div.Tensor, _aten.add.Tensor, _aten.sub.Tensor, _aten.reciprocal.default,
        _aten.relu6.default, _aten.hardtanh.default, _aten.clamp.default, _aten.clamp_max.default,
        _aten.minimum.default,
    }
)  # fmt: skip
#: Longest way back from the end that is looked at; a layer norm whose mean and variance are reshaped has twenty pieces.
_MOST = 30

#: Functions of a value, by operation and keyword arguments.
_BY_VALUE: list[tuple[Any, dict[str, Any], Callable[[Tensor], Tensor]]] = [
    (_aten.gelu.default, {"approximate": "tanh"}, lambda x: F.gelu(x, approximate="tanh")),
    (_aten.gelu.default, {}, F.gelu),
    (_aten.silu.default, {}, F.silu),
    (_aten.sigmoid.default, {}, torch.sigmoid),
    (_aten.hardswish.default, {}, F.hardswish),
    (_aten.hardsigmoid.default, {}, F.hardsigmoid),
    (_aten.mish.default, {}, F.mish),
]
# Constants are float32; the two GELUs are 5e-4 apart, other functions by more.
_TOLERANCE = 1e-5


def join_pieces(module: fx.GraphModule) -> int:
    """Put one operation in the place of each stretch of arithmetic that computes it, in place.

    Known are layer norms and RMS norms over one axis or the last ones, with weights and biases of any spelling; softmax and its
    logarithm; GELU (exact and by tanh), SiLU, sigmoid, h-swish, h-sigmoid and Mish.

    Parameters
    ----------
    module : fx.GraphModule
        Plain ATen graph whose constants are folded.

    Returns
    -------
    int
        Number of operations put in.
    """
    graph = module.graph
    joined = 0
    done: set[fx.Node] = set()
    for end in reversed(list(graph.nodes)):
        if end in done or not is_call(end, _ENDS) or not _is_real(end):
            continue
        for source, group in _groups(module, end):
            new = _replacement(module, end, source, group)
            if new is not None:
                new.meta = {**end.meta}
                end.replace_all_uses_with(new)
                done.update(group)
                joined += 1
                break
    if joined:
        graph.eliminate_dead_code()
        module.recompile()
    return joined


def _is_real(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _groups(module: fx.GraphModule, end: fx.Node) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Each tensor that everything in front of a node comes from, the farthest first, with the nodes from there on in order."""
    behind, waiting, tensors = set[fx.Node](), [end], dict[fx.Node, None]()
    while waiting and len(behind) < _MOST:
        node = waiting.pop(0)
        if node in behind:
            continue
        behind.add(node)
        for source in node.all_input_nodes:
            if source.op != "get_attr":
                tensors[source] = None
                if is_call(source, _ALL):
                    waiting.append(source)
    for source in reversed(tensors):
        group = _between(end, source) if _is_real(source) else None
        if group is not None and len(group) > 1:
            yield source, group


def _between(end: fx.Node, source: fx.Node) -> list[fx.Node] | None:
    """The nodes from a tensor to the end; None where another tensor comes in that is no constant."""
    order: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> bool:
        if node is source or node in order or node.op == "get_attr":
            return True
        if not is_call(node, _ALL) or len(order) >= _MOST or not all(map(visit, node.all_input_nodes)):
            return False
        order[node] = None
        return True

    return list(order) if visit(end) else None


def _replacement(
    module: fx.GraphModule, end: fx.Node, source: fx.Node, group: list[fx.Node]
) -> fx.Node | None:
    """The operation that a group computes, made right in front of its end; None where it is none that is known."""
    if any(is_call(node, _REDUCTIONS) for node in group):
        found = norm_of(
            lambda x: _run(module, source, group, x), source, _axes(source, group), _numbers(group)
        )
        return None if found is None else _emit(module, end, source, found, group)
    if all(is_call(node, _PIECES) and _of_numbers(module, node) for node in group):
        near = torch.linspace(-12, 12, 2401, dtype=torch.float64)
        far = torch.logspace(1.1, 6, 200, dtype=torch.float64)  # where only a bound can tell one from another
        points = torch.cat([near, far, -far])
        values = _run(module, source, group, points)
        if values is None or values.shape != points.shape or not torch.isfinite(values[: len(near)]).all():
            return None
        for target, keywords, function in _BY_VALUE:
            expected = function(points)
            difference = (values - expected).abs() / expected.abs().clamp_min(1)
            # a power or an exponential in pieces leaves the range of numbers far away
            if float(difference[torch.isfinite(values)].max()) < _TOLERANCE:
                with module.graph.inserting_before(end):
                    return module.graph.call_function(target, (source,), keywords)
    return None


def _of_numbers(module: fx.GraphModule, node: fx.Node) -> bool:
    tensors = [constant(module, each) for each in node.all_input_nodes]
    return all(each is None or each.numel() == 1 for each in tensors)


def _axes(source: fx.Node, group: list[fx.Node]) -> list[tuple[int, ...]]:
    """What is reduced over, of tensors as large as the source."""
    wanted = len(source.meta["val"].shape)
    found: dict[tuple[int, ...], None] = {}
    for node in group:
        if is_call(node, _REDUCTIONS) and len(node.args) > 1 and isinstance(node.args[1], list | tuple):
            given = node.all_input_nodes[0].meta["val"]
            if given.ndim == wanted and all(isinstance(axis, int) for axis in node.args[1]):
                found[tuple(sorted(int(axis) % wanted for axis in node.args[1]))] = None  # type: ignore[arg-type]
    return list(found)


def _numbers(group: list[fx.Node]) -> list[float]:
    """Single small numbers that a group adds or bounds by, among which an epsilon is."""
    given = [arg for node in group for arg in (*node.args, *node.kwargs.values())]
    small = {float(arg) for arg in given if isinstance(arg, float | int) and 0 <= arg < 0.1} | {0.0}
    # what is added to a deviation, not to a variance, acts like its square where it is too small to matter elsewhere
    return sorted(small | {value**2 for value in small if value**2 > torch.finfo(torch.float32).tiny})


def _run(module: fx.GraphModule, source: fx.Node, group: list[fx.Node], x: Tensor) -> Tensor | None:
    """What a group makes of a tensor, in double precision; None where it does not run on it."""
    values: dict[fx.Node, Any] = {source: x}

    def value(node: fx.Node) -> Any:
        if node not in values:
            held = constant(module, node)
            values[node] = held.double() if held is not None and held.is_floating_point() else held
        return values[node]

    try:
        for node in group:
            args, kwargs = fx.map_arg((node.args, node.kwargs), value)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, TypeError, IndexError):
        return None
    result = values[group[-1]]
    return result if isinstance(result, Tensor) else None


def _source_of(module: fx.GraphModule, tensor: Tensor, group: list[fx.Node]) -> str | None:
    """Name of the caller's parameter that a norm's weight or bias is, as its nodes read it."""
    for reader in (n for node in group for n in node.all_input_nodes if n.op == "get_attr"):
        value = getattr(module, str(reader.target))
        if (
            isinstance(value, Tensor)
            and value.shape == tensor.shape
            and torch.allclose(value, tensor, 1e-4, 1e-6)
        ):
            return str(reader.meta.get("source"))
    return None


def _emit(module: fx.GraphModule, end: fx.Node, source: fx.Node, norm: Norm, group: list[fx.Node]) -> fx.Node:
    """The operation of a norm in front of `end`; over one axis that is not the last, between two permutations."""
    graph, value = module.graph, source.meta["val"]
    with graph.inserting_before(end):
        if norm.kind in ("softmax", "log_softmax"):
            target = _aten.softmax.int if norm.kind == "softmax" else _aten.log_softmax.int
            return graph.call_function(target, (source, norm.axes[0]))
        tensors = []
        for name, tensor in (("weight", norm.weight), ("bias", norm.bias)):
            reader = None
            if tensor is not None:
                module.register_buffer(f"{end.name}_{name}", tensor)
                reader = graph.create_node("get_attr", f"{end.name}_{name}")
                reader.meta = {
                    "source": _source_of(module, tensor, group) or f"{end.name}_{name}",
                    "val": tensor,
                }
            tensors.append(reader)
        shape = [int(value.shape[axis]) for axis in norm.axes]
        order = [*(axis for axis in range(value.ndim) if axis not in norm.axes), *norm.axes]
        turned = order != list(range(value.ndim))
        x = _moved(graph, source, order) if turned else source
        if norm.kind == "layer_norm":
            new = graph.call_function(_aten.layer_norm.default, (x, shape, *tensors, norm.eps))
        else:
            new = graph.call_function(_aten.rms_norm.default, (x, shape, tensors[0], norm.eps))
        if not turned:
            return new
        new.meta = {**end.meta, "val": x.meta["val"]}
        return _moved(graph, new, [order.index(axis) for axis in range(value.ndim)])


def _moved(graph: fx.Graph, node: fx.Node, order: list[int]) -> fx.Node:
    new = graph.call_function(_aten.permute.default, (node, order))
    new.meta = {**node.meta, "val": node.meta["val"].permute(order)}
    return new
