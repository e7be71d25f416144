"""How a graph is called and what it returns, where that is more than single tensors by place or keyword, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from cat_plugin.errors import BundleError, ExportError
from cat_plugin.graph.results import Place, described, filled, is_structure
from cat_plugin.structures import is_plain, plain_structure
from cat_plugin.torch_compat import PyTreeCodeGen, PyTreeInfo, pytree

__all__ = ["call_of", "give_call", "is_flat"]


def is_flat(spec: pytree.TreeSpec) -> bool:
    """Whether every argument, by place or keyword, is a single value: a graph's placeholders are the arguments then."""
    return all(each.is_leaf() for arguments in spec.children() for each in arguments.children())


def call_of(info: PyTreeInfo) -> dict[str, Any]:
    """The structures of inputs and results of a graph that takes and returns their leaves."""
    if not is_plain(info.in_spec) or info.out_spec is None:
        raise ExportError(
            "a quantized model whose inputs are structures of other classes than tuples, lists and dicts cannot be written as "
            "plain data"
        )
    return {
        "arguments": list(info.orig_args),
        "inputs": _described(info.in_spec),
        "result": _described(info.out_spec),
    }


def _described(spec: pytree.TreeSpec) -> Any:
    """A structure as JSON; registered classes are dicts of their fields."""
    whole = pytree.tree_unflatten([Place(number) for number in range(spec.num_leaves)], spec)
    return described(plain_structure(whole))


def give_call(graph: fx.Graph, call: Mapping[str, Any]) -> None:
    """Give a graph of flat tensors the structures that :func:`call_of` described, in place."""
    arguments = call["arguments"]
    count = sum(node.op == "placeholder" for node in graph.nodes)
    outputs = next(node for node in graph.nodes if node.op == "output").args[0]
    sizes = {"inputs": count, "result": len(outputs)}
    if not all(isinstance(name, str) and name.isidentifier() for name in arguments) or not all(
        is_structure(call[key], size) for key, size in sizes.items()
    ):
        raise BundleError(
            "the structure of the model's inputs or outputs is not what belongs there; the file is damaged"
        )
    specs = [pytree.tree_structure(filled(call[key], [0] * size)) for key, size in sizes.items()]
    graph.set_codegen(PyTreeCodeGen(PyTreeInfo(list(arguments), *specs)))
