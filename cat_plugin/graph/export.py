"""Export of any model to an :class:`torch.export.ExportedProgram` with a dynamic batch axis.

For a quantized module the result is the standard QDQ graph; nothing is lowered here, the module already computes with
explicit ``quantized_decomposed`` operations. Weights that a foreign quantizer left in floating point in front of their
quantize operation are stored as the integers that this yields.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node

from cat_plugin.batches import ModelCall, read_batch
from cat_plugin.equivalence import Equivalence
from cat_plugin.errors import CATTypeError, ExportError
from cat_plugin.models import evaluating
from cat_plugin.structures import as_structure, output_names, plain_structure
from cat_plugin.torch_compat import schema_of, without_stack_traces

__all__ = ["example_call", "export_program", "fold_weights"]

_QUANTIZE = ("quantized_decomposed.quantize_per_tensor.", "quantized_decomposed.quantize_per_channel.")
_CONSTANTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def example_call(module: nn.Module, example_inputs: Any) -> ModelCall:
    """Read example inputs as a call of a module.

    Parameters
    ----------
    module : nn.Module
        What is called.
    example_inputs : object
        A batch as :func:`cat_plugin.batches.read_batch` reads it, or a tuple of tensors that are the positional arguments of
        a module that takes as many.

    Returns
    -------
    ModelCall

    Raises
    ------
    CATTypeError
        When it is no batch.
    ExportError
        When the module does not take it, or it has no row.
    """
    call = read_batch(example_inputs, "example_inputs")
    if not _takes(module, call) and isinstance(example_inputs, tuple):
        call = read_batch((example_inputs,), "example_inputs")  # not inputs with labels, but several inputs
    if not _takes(module, call):
        raise ExportError(
            f"example_inputs gives the model {call}, and it takes {_signature(module)}; expected a tensor (N, ...), a tuple of "
            "the positional arguments, or a mapping of keyword arguments."
        )
    if not call.rows:
        raise ExportError(f"example_inputs gives the model {call}; expected a batch (N, ...) with N >= 1.")
    return call.copied()


def _signature(module: nn.Module) -> inspect.Signature:
    """The arguments that a module takes; those of what it wraps, where it says so."""
    named = getattr(module, "signature", None)
    return named if isinstance(named, inspect.Signature) else inspect.signature(module.forward)


def _takes(module: nn.Module, call: ModelCall) -> bool:
    try:
        _signature(module).bind(*call.args, **call.kwargs)
    except TypeError:
        return False
    return True


def _places(signature: inspect.Signature, count: int) -> list[str]:
    """Names of the first so many positional arguments."""
    names: list[str] = []
    for each in signature.parameters.values():
        if each.kind is each.VAR_POSITIONAL:
            names += [f"{each.name}_{number}" for number in range(count - len(names))]
        elif each.kind is not each.VAR_KEYWORD:
            names.append(each.name)
    return names[:count]


@contextmanager
def _called_as(module: nn.Module, call: ModelCall) -> Iterator[None]:
    """For a while the module has the arguments of one call, by the names of its own, and returns plain structures.

    The inputs of the exported graph are then named after them, whatever ``forward(*args, **kwargs)`` passes on, and no class
    is needed to read it.
    """
    own, forward = module.__dict__.get("forward"), module.forward
    kinds = inspect.Parameter
    named = [kinds(name, kinds.POSITIONAL_OR_KEYWORD) for name in _places(_signature(module), len(call.args))]
    named += [kinds(name, kinds.KEYWORD_ONLY) for name in call.kwargs]

    def called(*args: Any, **kwargs: Any) -> Any:
        return plain_structure(as_structure(forward(*args, **kwargs)))

    called.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    module.__dict__["forward"] = called
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


def export_program(module: nn.Module, example_inputs: Any) -> ExportedProgram:
    """Export ``module`` for any batch size.

    Parameters
    ----------
    module : nn.Module
        A result of :func:`cat_plugin.ptq.quantize`, a corrected module, or any module that :func:`torch.export.export` takes.
    example_inputs : Tensor, tuple or mapping
        A batch of inputs: a tensor (N, ...), a tuple of the positional arguments, or a mapping of keyword arguments; every
        tensor with N rows in front has a dynamic batch axis.  The program is compared with the module on them, at two batch
        sizes, in all outputs.

    Returns
    -------
    ExportedProgram
        Batch axis dynamic from 1 on, weights as integers; it is called as the module is in the example, and returns tuples,
        lists and dicts, data classes among them.  It holds no example inputs, so that what is saved has no pickled tensors.

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
    call = example_call(module, example_inputs)
    if call.rows == 1:  # is taken for a constant by the tracer, so two rows stand for "some"
        call = call.select(torch.zeros(2, dtype=torch.int64))
    try:
        with torch.no_grad(), evaluating(module), _called_as(module, call):
            length = _length(call.tensors)
            program = _for_any(module, call, length)
            if length is not None and _keeps_length(program):  # some operation wants a number
                program = _for_any(module, call, None)
    except Exception as error:
        raise ExportError(
            f"{type(module).__name__} cannot be exported for any batch size: {_reason(module, error)}"
        ) from error
    program.example_inputs = None
    program = fold_weights(program)
    named = output_names(module)
    if named is not None:
        program.graph_module.meta["output_names"] = named
    with evaluating(module):
        Equivalence(module, call, ExportError).check("export", program.module(check_guards=False))
    return program


def _length(tensors: Sequence[Tensor]) -> int | None:
    """Length of the sequences (N, T) of integers that come first; None where anything else does."""
    if not tensors or tensors[0].ndim != 2 or tensors[0].is_floating_point():
        return None
    return int(tensors[0].shape[1])


@without_stack_traces()
def _for_any(module: nn.Module, call: ModelCall, length: int | None) -> ExportedProgram:
    """Exported for any batch size, and for sequences of any length in the place of that length."""
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    rows: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor in call.tensors:
        if tensor.ndim and len(tensor) == call.rows:
            follows = tensor.ndim > 1 and tensor.shape[1] == length
            rows[tensor] = {0: batch, 1: torch.export.Dim.AUTO} if follows else {0: batch}
    shapes = rows.dynamic_shapes(module, call.args, call.kwargs)
    return torch.export.export(module, call.args, call.kwargs, dynamic_shapes=shapes, strict=False)


def _keeps_length(program: ExportedProgram) -> bool:
    """Whether a length that was to be any turned out to be one."""
    given = set(program.graph_signature.user_inputs)
    sizes = [
        size
        for node in program.graph.nodes
        if node.name in given and isinstance(node.meta.get("val"), Tensor)
        for size in node.meta["val"].shape[1:]
    ]
    return any(not isinstance(size, int) and size.node.expr.is_number for size in sizes)


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

    constant: set[Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            known = node.name in specs and specs[node.name].target not in written
        else:
            schema = schema_of(node.target)
            pure = node.op == "call_function" and schema is not None and not schema.is_mutable
            known = pure and bool(node.all_input_nodes) and constant.issuperset(node.all_input_nodes)
        if known:
            constant.add(node)

    found: list[tuple[Node, Node, Tensor]] = []
    for node in list(graph.nodes):
        if not str(node.target).startswith(_QUANTIZE) or node not in constant:
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
