"""Export of any classifier to an :class:`torch.export.ExportedProgram` with a dynamic batch axis.

For a quantized module the result is the standard QDQ graph; nothing is lowered here, the module already computes with
explicit ``quantized_decomposed`` operations. Weights that a foreign quantizer left in floating point in front of their
quantize operation are stored as the integers that this yields.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node

from cat_plugin.batches import read_batch
from cat_plugin.equivalence import Equivalence
from cat_plugin.errors import CATTypeError, ExportError
from cat_plugin.models import evaluating
from cat_plugin.torch_compat import schema_of

__all__ = ["export_program", "fold_weights"]

_QUANTIZE = ("quantized_decomposed.quantize_per_tensor.", "quantized_decomposed.quantize_per_channel.")
_CONSTANTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def _example(example_inputs: Any) -> Tensor:
    call = read_batch(example_inputs, "example_inputs")
    if len(call.args) != 1 or not isinstance(call.args[0], Tensor):
        raise CATTypeError(
            f"example_inputs gives the model {call}; expected a tensor (N, ...) or a tuple of one."
        )
    inputs = call.args[0]
    if inputs.ndim < 1 or len(inputs) == 0:
        raise ExportError(
            f"example_inputs has shape {tuple(inputs.shape)}; expected a batch (N, ...) with N >= 1."
        )
    # a batch of one is taken for a constant by the tracer, so two rows stand for "some"
    return inputs.detach() if len(inputs) > 1 else torch.cat([inputs.detach(), inputs.detach()])


def export_program(module: nn.Module, example_inputs: Any) -> ExportedProgram:
    """Export ``module`` for any batch size.

    Parameters
    ----------
    module : nn.Module
        Takes one tensor (N, ...): a result of :func:`cat_plugin.ptq.quantize`, a corrected module, or any module
        that :func:`torch.export.export` takes.
    example_inputs : Tensor or tuple of one Tensor
        (N, ...); the program is compared with the module on them, at two batch sizes.

    Returns
    -------
    ExportedProgram
        Batch axis dynamic from 1 on, weights as integers; it holds no example inputs, so that what is saved has no
        pickled tensors.

    Raises
    ------
    ExportError
        Naming the operation or module that cannot be exported, or saying that the program computes something else than
        the module does.
    """
    if not isinstance(module, nn.Module):
        raise CATTypeError(f"the module is a {type(module).__name__}; expected a torch.nn.Module.")
    obstacle = getattr(module, "export_obstacle", None)
    if obstacle is not None:
        raise ExportError(f"{type(module).__name__} cannot be exported: {obstacle}")
    example = _example(example_inputs)
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    try:
        with torch.no_grad(), evaluating(module):
            program = torch.export.export(module, (example,), dynamic_shapes=({0: batch},), strict=False)
    except Exception as error:
        raise ExportError(
            f"{type(module).__name__} cannot be exported for any batch size: {_reason(module, error)}"
        ) from error
    program.example_inputs = None
    program = fold_weights(program)
    with evaluating(module):
        Equivalence(module, example, ExportError).check("export", program.module(check_guards=False))
    return program


def fold_weights(program: ExportedProgram) -> ExportedProgram:
    """Store the weights of a QDQ graph as integers where they are still quantized in every run.

    Each ``quantize_per_tensor`` or ``quantize_per_channel`` of nothing but parameters and buffers is computed
    once; the result becomes a buffer of the parameter's name, and the parameter goes when nothing else reads it.

    Parameters
    ----------
    program : ExportedProgram
        Changed in place.

    Returns
    -------
    ExportedProgram
        The same; what it computes is unchanged to the bit.
    """
    graph, signature = program.graph, program.graph_signature
    specs = {spec.arg.name: spec for spec in signature.input_specs if spec.kind in _CONSTANTS}
    written = set(signature.buffers_to_mutate.values())

    def value(item: Any) -> Any:
        if not isinstance(item, Node):
            return item
        if item.op == "placeholder":
            name = str(specs[item.name].target)
            return program.state_dict[name] if name in program.state_dict else program.constants[name]
        assert callable(item.target)
        args, kwargs = torch.fx.node.map_arg((item.args, item.kwargs), value)
        return item.target(*args, **kwargs)

    def constant(node: Node) -> bool:
        if node.op == "placeholder":
            return node.name in specs and specs[node.name].target not in written
        schema = schema_of(node.target)
        pure = node.op == "call_function" and schema is not None and not schema.is_mutable
        return pure and bool(node.all_input_nodes) and all(constant(each) for each in node.all_input_nodes)

    found: list[tuple[Node, Node, Tensor]] = []
    for node in list(graph.nodes):
        if not str(node.target).startswith(_QUANTIZE) or not constant(node):
            continue
        source = node
        while source.op != "placeholder":
            source = source.all_input_nodes[0]
        with torch.no_grad():
            integers = value(node).detach().clone()
        chain, first = [node], node.all_input_nodes[0]
        while first.op != "placeholder":
            chain, first = [*chain, first], first.all_input_nodes[0]
        with graph.inserting_before(source):
            stored = graph.placeholder(f"{source.name}_integers")
        stored.meta = {"val": node.meta["val"]}
        node.replace_all_uses_with(stored)
        for each in chain:
            if not each.users:
                graph.erase_node(each)
        # A placeholder's target is the name of an argument, which only the node's own name is kept unique for.
        stored.target = stored.name
        found.append((source, stored, integers))
    for source in dict.fromkeys(source for source, *_ in found):
        spec = specs[source.name]
        position = signature.input_specs.index(spec)
        name = str(spec.target)
        if not source.users:
            graph.erase_node(source)
            signature.input_specs.remove(spec)
            (program.state_dict if name in program.state_dict else program.constants).pop(name)
        for stored, integers in [(stored, integers) for each, stored, integers in found if each is source]:
            while name in program.state_dict or name in program.constants:
                name += "_integers"
            kept = InputSpec(InputKind.BUFFER, TensorArgument(stored.name), name, persistent=True)
            signature.input_specs.insert(position, kept)
            program.state_dict[name] = integers
            position += 1
    program.graph_module.recompile()
    return program


def _reason(module: nn.Module, error: Exception) -> str:
    """One line on what failed: the innermost module or operation of the traceback, and the message."""
    names = {type(m).__name__: name or type(m).__name__ for name, m in module.named_modules()}
    place = ""
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and trace.tb_frame.f_code.co_name == "forward":
            path = next(
                (n for n, m in module.named_modules() if m is owner), names.get(type(owner).__name__, "")
            )
            place = f"in {path or 'the outermost module'} ({type(owner).__name__}), line {trace.tb_lineno}: "
        trace = trace.tb_next
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = lines[0] if lines else type(error).__name__
    return (
        f"{place}{type(error).__name__}: {message} Make the forward pass independent of the batch size and of "
        "the data, or export a part of the model."
    )
