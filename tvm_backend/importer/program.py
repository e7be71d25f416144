"""From a torch ``ExportedProgram`` to a relax module with the symbolic operators of :mod:`tvm_backend.dialect`.

The table of contents: rewrite, compute constants, check every operator and argument, convert, check every result's type.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import tvm
from torch import fx
from torch.export.graph_signature import ConstantArgument
from tvm import relax

from cat_plugin.errors import CompileError
from cat_plugin.torch_compat import OpOverload, without_stack_traces
from tvm_backend import compat, dialect
from tvm_backend.importer import constants, honoured, plain, rewrites
from tvm_backend.importer.converters import CONVERTERS, Converter
from tvm_backend.importer.honoured import where

__all__ = ["Prepared", "batch_variable", "function_inputs", "import_program", "prepare"]

_OURS = frozenset(name for name in CONVERTERS if name not in honoured.HONOURED)


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _calls(program: Any) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.op == "call_function"]


def _unknown_operators(calls: list[fx.Node], importer: Any) -> list[str]:
    unknown = []
    for node in calls:
        name = _name(node)
        is_aten = isinstance(node.target, OpOverload) and name not in _OURS
        converted = (
            name in honoured.HONOURED if is_aten else name in CONVERTERS or name in importer.convert_map
        )
        if not converted or (name not in CONVERTERS and name not in importer.convert_map):
            unknown.append(f"{node.target} ({where(node)})")
    return unknown


def _differs(value: Any, expected: Any) -> str:
    """How the type of a converted result differs from torch's, or an empty string."""
    if isinstance(expected, tuple | list):
        expected = expected[0] if expected else None
        fields = compat.tuple_fields(compat.type_of(value)) if isinstance(value, relax.Expr) else None
        kind = fields[0] if fields else getattr(value, "ty", None)
    else:
        kind = compat.type_of(value) if isinstance(value, relax.Expr) else None
    if not isinstance(expected, torch.Tensor) or kind is None or getattr(kind, "shape", None) is None:
        return ""
    dtype = str(expected.dtype).removeprefix("torch.")
    if str(kind.dtype).rpartition(".")[2] != dtype:
        return f"{kind.dtype}, not {dtype}"
    shape = [int(size) if hasattr(size, "value") else None for size in kind.shape.values]
    wanted = [size if isinstance(size, int) else None for size in expected.shape]
    same = len(shape) == len(wanted) and all(
        a is None or b is None or a == b for a, b in zip(shape, wanted, strict=True)
    )
    return "" if same else f"a shape of {shape}, not {wanted}"


def _checked(convert: Any, ours: bool) -> Converter:
    """A converter whose result must have the type and shape that torch says."""

    def run(node: fx.Node, importer: Any) -> Any:
        try:
            value = convert(node, importer) if ours else convert(node)
        except CompileError:
            raise
        except Exception as error:
            raise CompileError(
                f"{node.target} ({where(node)}): TVM {tvm.__version__} could not import it: {error}"
            ) from error
        wrong = _differs(value, node.meta.get("val"))
        if wrong:
            raise CompileError(
                f"{node.target} ({where(node)}): TVM {tvm.__version__} makes of it {wrong}. Express it by other operators, "
                "or keep that part outside of the compiled model"
            )
        return value

    return run


def _drop_constants(program: Any) -> None:
    """Leave out, in place, arguments and results that are no tensors: they are part of the graph, or of its description."""
    signature, graph = program.graph_signature, program.graph
    nodes = {node.name: node for node in graph.nodes}
    for spec in [each for each in signature.input_specs if isinstance(each.arg, ConstantArgument)]:
        signature.input_specs.remove(spec)
        graph.erase_node(nodes[spec.arg.name])
    signature.output_specs[:] = [
        each for each in signature.output_specs if not isinstance(each.arg, ConstantArgument)
    ]
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = (tuple(leaf for leaf in output.args[0] if isinstance(leaf, fx.Node)),)


@dataclass(frozen=True)
class Prepared:
    """A program as TVM's converters read it rightly; made by :func:`prepare`.

    Attributes
    ----------
    program : torch.export.ExportedProgram
        In operators that there are converters for.
    known : dict of str to torch.Tensor
        Its constants by the name of their node.
    """

    program: Any
    known: dict[str, torch.Tensor]

    def module(self, left_out: int = 0) -> Any:
        """Translate it.

        Parameters
        ----------
        left_out : int, optional
            How many of the results are left out, the last ones.

        Returns
        -------
        tvm.IRModule
            One function, ``main``, from the inputs to the outputs, with the weights as constants.

        Raises
        ------
        CompileError
            When an operator cannot be imported; the message names it and its place in the model.
        """
        from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

        program = self.program
        importer = ExportedProgramImporter()
        importer.cat_constants = self.known
        calls = _calls(program)
        unknown = _unknown_operators(calls, importer)
        if unknown:
            raise CompileError(
                f"operators that cannot be imported into TVM {tvm.__version__}: {'; '.join(unknown)}. "
                "Express them by other operators, or keep that part outside of the compiled model"
            )
        for node in calls:
            honoured.check(node, _OURS)
        converters = {
            name: _checked(CONVERTERS[name], True)
            if name in CONVERTERS
            else _checked(importer.convert_map[name], False)
            for name in map(_name, calls)
        }
        try:
            with compat.BUILDERS, _without(program, left_out):
                mod = importer.from_exported_program(program, **compat.importer_arguments(converters))
        except CompileError:
            raise
        except Exception as error:
            raise CompileError(f"TVM {tvm.__version__} could not import the graph: {error}") from error
        # With an upper bound of the batch the memory for that many would be planned, and taken, at every call.
        mod["main"] = mod["main"].without_attr("tir_var_upper_bound")
        return mod


def prepare(program: Any) -> Prepared:
    """Rewrite a torch ``ExportedProgram`` for :meth:`Prepared.module`.

    Parameters
    ----------
    program : torch.export.ExportedProgram
        A QDQ graph: quantized weights and activations with explicit ``quantized_decomposed`` operators, possibly ending in
        one of the ``cat`` correction operators.  The batch dimension may be dynamic.
    """
    program = plain.decomposed(program) or _decomposed(program)
    known = constants.fold(program)
    _drop_constants(program)
    return Prepared(program, known)


@without_stack_traces()
def _decomposed(program: Any) -> Any:
    with warnings.catch_warnings():
        # torch 2.13 copies its own pytrees through a class that it deprecates.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
        return program.run_decompositions(rewrites.table())


def import_program(program: Any) -> Any:
    """Import a torch ``ExportedProgram``: :func:`prepare` it, and translate it with :meth:`Prepared.module`."""
    return prepare(program).module()


@contextmanager
def _without(program: Any, count: int) -> Iterator[None]:
    """Meanwhile the program has not got its last results."""
    specs, output = program.graph_signature.output_specs, program.graph.output_node()
    results, described = output.args[0], list(specs)
    kept = len(results) - count
    output.args, specs[:] = (results[:kept],), described[:kept]
    try:
        yield
    finally:
        output.args, specs[:] = (results,), described


def batch_variable(mod: Any) -> Any | None:
    """The symbolic batch size of ``main``, or None when the batch is fixed."""
    batch = dialect.shape_of(mod["main"].params[0])[0]
    return None if isinstance(batch, int) else batch


def function_inputs(mod: Any) -> list[Any]:
    """The relax types of the inputs of ``main``."""
    return [compat.type_of(param) for param in mod["main"].params if isinstance(param, relax.Var)]
