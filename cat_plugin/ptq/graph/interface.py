"""How a model is called and what it returns, beside the flat tensors that its graph takes and makes.

The engine's graphs have a placeholder for each tensor among the arguments and return the leaves of the result.  What is handed
over takes the caller's arguments and returns the caller's structure again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from cat_plugin.ptq.graph.ops import output_leaves
from cat_plugin.ptq.rows import Inputs
from cat_plugin.structures import is_plain, names_of_results, output_names
from cat_plugin.torch_compat import PyTreeCodeGen, PyTreeInfo, pytree

__all__ = ["Interface"]


@dataclass(frozen=True)
class Interface:
    """Structure of a model's arguments and of its result.

    Attributes
    ----------
    inputs : Inputs
        Arguments of the model; their values do not matter.
    arguments : tuple of str
        Names of the arguments, those given by place first.
    result : pytree.TreeSpec
        Structure of what it returns.
    outputs : tuple of str
        A name for each leaf of the result.
    named : bool
        Whether the model itself says what they are called.
    """

    inputs: Inputs
    arguments: tuple[str, ...]
    result: pytree.TreeSpec
    outputs: tuple[str, ...]
    named: bool

    @classmethod
    def of(cls, model: nn.Module, inputs: Inputs, result: Any, exported: fx.Graph) -> Interface:
        """The interface of a model that makes `result` of `inputs`, and that was exported as a graph.

        Parameters
        ----------
        model : nn.Module
            As the caller holds it.
        inputs : Inputs
            Of one call.
        result : object
            As :func:`cat_plugin.structures.as_structure` reads it.
        exported : fx.Graph
            With the names of the arguments.
        """
        info = getattr(getattr(exported, "_codegen", None), "pytree_info", None)
        arguments = tuple(name for name in (info.orig_args if info is not None else ()) if name != "self")
        names = names_of_results(model, result)
        return cls(
            inputs, arguments, pytree.tree_structure(result), tuple(names), names == output_names(model)
        )

    def restore(self, graph: fx.Graph) -> None:
        """Give a graph of flat tensors the caller's arguments and result, in place."""
        output = next(n for n in graph.nodes if n.op == "output")
        leaves = output_leaves(graph)
        arguments, spec = self.inputs.structure
        example = self.inputs.example
        flat = all(isinstance(each, Tensor) for each in (*example.args, *example.kwargs.values()))
        if flat and is_plain(self.result):
            output.args = (pytree.tree_unflatten(leaves, self.result),)
            return
        self._add_constants(graph, arguments)
        output.args = (tuple(leaves),)
        graph.set_codegen(PyTreeCodeGen(PyTreeInfo(list(self.arguments), spec, self.result)))

    def _add_constants(self, graph: fx.Graph, arguments: Sequence[Any]) -> None:
        """A placeholder, which nothing reads, in the place of each argument that is no tensor."""
        tensors = iter([n for n in graph.nodes if n.op == "placeholder"])
        last = None
        for number, value in enumerate(arguments):
            if isinstance(value, Tensor):
                last = next(tensors)
                continue
            first = next(iter(graph.nodes))
            with graph.inserting_after(last) if last is not None else graph.inserting_before(first):
                last = graph.placeholder(f"constant_{number}")
