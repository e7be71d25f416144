"""What does not depend on the inputs is computed once, by torch itself: indices, masks, weights of a resize.

So they have torch's own rounding, and TVM sees plain constants.  Quantized weights stay as they are: what is not ATen is
not computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from cat_plugin.torch_compat import OpOverload, schema_of

__all__ = ["constant", "constants_of", "fold"]

_SMALL = 1 << 16
"""Elements up to which a constant may be larger than what it is computed from."""


def constant() -> None:
    """Stands in the graph for a tensor, which its node holds as ``meta["constant"]``."""


def constants_of(program: Any) -> dict[str, torch.Tensor]:
    """The program's parameters, buffers and lifted constants by the name of their placeholder."""
    found = {}
    for spec in program.graph_signature.input_specs:
        if spec.target is None:
            continue
        tensor = program.state_dict.get(spec.target, program.constants.get(spec.target))
        if isinstance(tensor, torch.Tensor):
            found[spec.arg.name] = tensor.detach()
    return found


def _computable(node: fx.Node) -> bool:
    target = node.target
    return (
        node.op == "call_function"
        and isinstance(target, OpOverload)
        and target.namespace == "aten"
        and not schema_of(target).name.startswith("aten::empty")
        and torch.Tag.nondeterministic_seeded not in target.tags
    )


def _value(node: fx.Node, known: dict[fx.Node, torch.Tensor]) -> torch.Tensor | None:
    """The result of a node whose operands are all known; None when they are not, or it would be large."""
    operands = node.all_input_nodes
    if not _computable(node) or any(operand not in known for operand in operands):
        return None
    shape = getattr(node.meta.get("val"), "shape", None)
    if shape is None or not all(isinstance(size, int) for size in shape):
        return None
    size = torch.Size(shape).numel()
    if size > _SMALL and size > sum(known[operand].numel() for operand in operands):
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda operand: known[operand])
    with torch.no_grad():
        result = node.target(*args, **kwargs)  # type: ignore[operator]
    return result.contiguous() if isinstance(result, torch.Tensor) else None


def _only_branch(node: fx.Node, known: dict[fx.Node, torch.Tensor]) -> fx.Node | None:
    """What ``where(condition, a, b)`` is when a constant condition holds nowhere, or everywhere, and nothing is broadcast."""
    if node.target is not torch.ops.aten.where.self or node.args[0] not in known:
        return None
    condition = known[node.args[0]]  # type: ignore[index]
    for holds, branch in ((False, node.args[2]), (True, node.args[1])):
        if bool((condition == holds).all()) and isinstance(branch, fx.Node):
            kept, whole = branch.meta["val"], node.meta["val"]
            if kept.dtype == whole.dtype and tuple(kept.shape) == tuple(whole.shape):
                return branch
    return None


def fold(program: Any) -> dict[str, torch.Tensor]:
    """Compute constants in the graph of `program`, in place.

    Returns
    -------
    dict
        All constant tensors of the graph by the name of their node.
    """
    graph = program.graph
    by_name = constants_of(program)
    known = {node: by_name[node.name] for node in graph.nodes if node.name in by_name}
    for node in list(graph.nodes):
        kept = _only_branch(node, known)
        if kept is not None:
            node.replace_all_uses_with(kept)
            continue
        value = _value(node, known)
        if value is None:
            continue
        with graph.inserting_before(node):
            new = graph.call_function(constant, ())
        new.meta = {**node.meta, "constant": value}
        node.replace_all_uses_with(new)
        known[new] = value
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and (node.target is constant or _computable(node)):
            graph.erase_node(node)
    return {node.name: value for node, value in known.items()}
