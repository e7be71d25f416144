"""Constants of a graph that are to be changed for one reader alone."""

from __future__ import annotations

from torch import Tensor, fx

from cat_plugin.ptq.graph.ops import constant

__all__ = ["own_constant"]


def own_constant(module: fx.GraphModule, node: fx.Node, index: int) -> Tensor:
    """The constant that is an argument of the node, as a tensor that no other node reads."""
    reader = node.args[index]
    assert isinstance(reader, fx.Node)
    value = constant(module, reader)
    assert value is not None
    shared = any(
        n is not reader and n.op == "get_attr" and n.target == reader.target for n in module.graph.nodes
    )
    if len(reader.users) == 1 and not shared:
        return value
    name = f"{reader.target}_of_{node.name}"
    module.register_buffer(name, value.clone())
    with module.graph.inserting_before(node):
        new = module.graph.create_node("get_attr", name)
    new.meta = dict(reader.meta)
    node.args = (*node.args[:index], new, *node.args[index + 1 :])
    module.recompile()
    own = constant(module, new)
    assert own is not None
    return own
