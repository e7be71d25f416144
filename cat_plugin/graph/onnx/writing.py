"""A quantized model as ONNX: standard QDQ, a dynamic batch, and the cluster-affine step in standard operators."""

from __future__ import annotations

import logging
import os
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, OutputSpec, TensorArgument

from cat_plugin.errors import CATTypeError, CATValueError, ExportError
from cat_plugin.graph.bundle import Bundle, read_bundle
from cat_plugin.graph.export import export_program
from cat_plugin.graph.onnx import aten_elementwise, aten_layers, aten_moves, aten_shapes, quantizers, rewrites  # noqa: F401
from cat_plugin.graph.onnx.files import need, write_model
from cat_plugin.graph.onnx.runtimes import refusals, runtime_notes
from cat_plugin.graph.onnx.writer import CONVERTERS, Writer, operation_of
from cat_plugin.graph.onnx.writing_check import check_written
from cat_plugin.structures import names_of, output_names
from cat_plugin.torch_compat import without_stack_traces

__all__ = ["OPSETS", "export_onnx", "to_onnx"]

_log = logging.getLogger("cat_plugin")

#: The opsets that can be written, and the version of the file format that belongs to each.
OPSETS = {21: 10, 22: 10, 23: 11, 24: 12, 25: 13}


def export_onnx(
    model: torch.nn.Module | ExportedProgram | Bundle | str | os.PathLike[str],
    path: str | os.PathLike[str],
    example_inputs: tuple[torch.Tensor, ...] | torch.Tensor | None = None,
    *,
    opset: int = 21,
    runtime: str | None = None,
) -> Path:
    """Write a quantized model, with its correction if it has one, as an ONNX file.

    Parameters
    ----------
    model : torch.nn.Module, ExportedProgram, Bundle or path
        A module as :func:`cat_plugin.export_bundle` takes it, its exported program, or a bundle or its directory.
    path : path
        The file to write; one that stands there is replaced.
    example_inputs : tensor or tuple of tensors, optional
        One batch; needed for a module. Also what the file is compared with the module on; random values where it is
        left out.
    opset : int, default 21
        21 to 25. From 25 on values of 2 bits have a type of their own; before, they are stored in 4.
    runtime : {"onnxruntime", "openvino"}, optional
        Refuse what this runtime cannot take, before anything is written. Without, it is logged as a warning.

    Returns
    -------
    pathlib.Path
        Absolute.

    Raises
    ------
    ExportError
        When the model cannot be exported, an operation has no counterpart (it is named, with its module), `runtime`
        cannot take the result, or ONNX Runtime computes something else than the module does.
    CATTypeError, CATValueError
        When an argument cannot be used.

    Notes
    -----
    The file computes what the module does but for rounding: ONNX divides by a scale where torch multiplies by its
    inverse, so that a value half way between two integers may fall to the other side.

    Where ONNX Runtime is installed the model is run by it on one row and on three before it is written. Each operation of
    the module, given ONNX Runtime's values in front of it, must give ONNX Runtime's result to 1e-3 of the largest value,
    and each quantized value must be within half a step of what was quantized. The outputs under its default
    optimizations are compared with those of the nodes: beyond 10 % of their norm is a warning, beyond 50 % an error.
    """
    program = _program(model, example_inputs)
    _check_opset(opset)
    notes = runtime_notes(program, opset)
    refused = [] if runtime is None else refusals(notes, runtime)
    if refused:
        raise ExportError(f"{runtime} cannot take this model: {'; '.join(refused)}")
    for note in notes:
        _log.warning("%s", note.text)
    model_proto, writer = _written(program, opset)
    check_written(writer, model_proto, path, example_inputs)
    return write_model(model_proto, path)


def _check_opset(opset: int) -> None:
    if opset not in OPSETS:
        raise CATValueError(f"opset is {opset!r}; it must be one of {', '.join(map(str, OPSETS))}")


def _program(model: Any, example_inputs: Any) -> ExportedProgram:
    if isinstance(model, str | os.PathLike):
        model = read_bundle(model)
    if isinstance(model, Bundle):
        return model.program()
    if isinstance(model, ExportedProgram):
        return model
    if not isinstance(model, torch.nn.Module):
        raise CATTypeError(
            f"the model is a {type(model).__name__}; expected a torch.nn.Module, an ExportedProgram, or a bundle"
        )
    if example_inputs is None:
        raise CATValueError("a module is exported by its example_inputs, which are missing; give one batch")
    return export_program(model, example_inputs)


def to_onnx(program: ExportedProgram, opset: int = 21) -> Any:
    """The program as an ONNX model in memory.

    Parameters
    ----------
    program : torch.export.ExportedProgram
        Left as it is.
    opset : int, default 21
        Version of the standard operators to write.

    Returns
    -------
    onnx.ModelProto
        Checked by ONNX's own checker; inputs have the program's names, outputs those that the exported model gave them (an
        imported ONNX model's stay), else those of the result's keys and fields, else ``output`` or ``output_0`` and so on.

    Raises
    ------
    ExportError
        Naming the operation that has no counterpart, and where it stands.
    """
    _check_opset(opset)
    return _written(program, opset)[0]


def _results(program: ExportedProgram) -> list[OutputSpec]:
    """What the model returns; not what it writes into its inputs and buffers."""
    every = program.graph_signature.output_specs
    return [each for each in every if each.kind is OutputKind.USER_OUTPUT]


def _output_names(program: ExportedProgram) -> list[str]:
    """What the model called its results, else keys and fields, where it has them for all; else ``output``, or numbered."""
    given = [isinstance(each.arg, TensorArgument) for each in _results(program)]
    count = sum(given)
    own = output_names(program.graph_module)
    if own is not None and len(own) == count:
        return own
    if count == 1:
        return ["output"]
    structure = program.call_spec.out_spec
    every = names_of(structure.unflatten(range(structure.num_leaves))) if structure is not None else []
    names = list(compress(every, given))
    named = len(names) == count and all(name.replace(".", "_").isidentifier() for name in names)
    return names if named else [f"output_{i}" for i in range(count)]


def _written(program: ExportedProgram, opset: int) -> tuple[Any, Writer]:
    """The model, and the writer that knows which of its values stands for which operation."""
    onnx = need("onnx")
    wanted = _output_names(program)
    program = _known_operations(program)
    # what is no tensor is left out
    results = [each.arg.name for each in _results(program) if isinstance(each.arg, TensorArgument)]
    writer = Writer(program, opset)
    nodes = {node.name: node for node in program.graph.nodes}
    inputs = []
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT and isinstance(spec.arg, TensorArgument):
            node = nodes[spec.arg.name]
            writer.names[node] = writer.fresh(node.name)
            inputs.append(writer.described(writer.names[node], node.meta["val"]))
    reserved = [writer.fresh(name) for name in wanted]
    for node in program.graph.nodes:
        if node.op == "call_function" and "_assert" not in str(node.target):
            writer.write(node)
    outputs = []
    for name, result in zip(reserved, results, strict=True):
        # A node of its own: a result may be read inside the graph as well, or be an input.
        writer.nodes.append(
            onnx.helper.make_node("Identity", [writer.value(nodes[result])], [name], name=name)
        )
        outputs.append(writer.described(name, nodes[result].meta["val"]))
    graph = onnx.helper.make_graph(
        _living(writer, set(reserved)), "cat_ptq", inputs, outputs, writer.initializers
    )
    model = onnx.helper.make_model(
        graph,
        producer_name="cat-ptq",
        opset_imports=[onnx.helper.make_opsetid("", opset)],
        ir_version=OPSETS[opset],
    )
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:
        raise ExportError(
            f"the ONNX model that was written does not pass its checker: {error}; report it"
        ) from error
    return model, writer


@without_stack_traces()
def _known_operations(program: ExportedProgram) -> ExportedProgram:
    """The program itself where every operation has a converter that takes it, else with the others decomposed."""
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    names = {operation_of(node) for node in calls}
    table = rewrites.table()
    known = all(name in CONVERTERS or "_assert" in name for name in names)
    if known and not any(node.target in table for node in calls):
        return program
    if not known:
        every = torch.export.default_decompositions()
        for operation in [each for each in every if str(each) in CONVERTERS]:
            del every[operation]
        table = {**every, **table}
    decomposed: ExportedProgram = program.run_decompositions(table)
    return decomposed


def _living(writer: Writer, read: set[str]) -> list[Any]:
    """The nodes that `read`, the outputs, depend on; drops the constants that none of them reads."""
    kept = []
    for node in reversed(writer.nodes):
        if any(output in read for output in node.output):
            kept.append(node)
            read.update(node.input)
    writer.initializers = [each for each in writer.initializers if each.name in read]
    return kept[::-1]
