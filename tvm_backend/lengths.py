"""Programs that take sequences of any length, made to take those of one: libraries are compiled for one.

TVM's kernels here know every size but the batch.  Shorter sequences are padded: behind causal attention on the right, whose tokens
then are as they were; elsewhere as the model marks its padding.
"""

from __future__ import annotations

from typing import Any

from cat_plugin.errors import CompileError

__all__ = ["of_one_length"]


def of_one_length(program: Any, tokens: int | None) -> Any:
    """A program for sequences of one length.

    Parameters
    ----------
    program : torch.export.ExportedProgram
        Of the model.
    tokens : int or None
        Their length; None is that of the example inputs that the program was exported with.

    Returns
    -------
    torch.export.ExportedProgram
        The same one where it takes one length anyway.

    Raises
    ------
    CompileError
        If the program takes no such length.
    """
    inputs = _inputs(program)
    symbols = {str(size): size for value in inputs for size in value.shape[1:] if not isinstance(size, int)}
    if not symbols:
        if tokens is not None:
            raise CompileError(
                f"tokens={tokens} was given for a graph that takes inputs of one size ({_words(inputs)}); leave it out, or "
                "export the graph from a model that reads token numbers (N, T)"
            )
        return program
    hints = {int(size.node.hint) for size in symbols.values()}
    if len(hints) > 1:
        raise CompileError(
            f"the graph takes inputs of several sizes ({_words(inputs)}); a library has one length. Export it with example "
            "inputs whose token axes are equally long"
        )
    # Axes that the graph does not compare have symbols of their own, such as those of a mask that it does not read.
    bounds = [each for symbol, each in program.range_constraints.items() if str(symbol) in symbols]
    least = max((int(each.lower) for each in bounds), default=1)
    most = min((each.upper for each in bounds), default=None)
    length = hints.pop() if tokens is None else tokens
    if length < least or (most is not None and length > most):
        raise CompileError(
            f"tokens={tokens} is outside of what the graph takes; expected {least} to {most}. Its tables of positions end "
            "with the windows that it was calibrated on: calibrate on longer ones"
        )
    return _exported(program, inputs, length)


def _inputs(program: Any) -> list[Any]:
    """The tensors that the program's placeholders of the caller stand for."""
    given = set(program.graph_signature.user_inputs)
    return [
        n.meta["val"]
        for n in program.graph.nodes
        if n.op == "placeholder" and n.name in given and hasattr(n.meta.get("val"), "shape")
    ]


def _words(inputs: list[Any]) -> str:
    return ", ".join("(" + ", ".join(map(str, value.shape)) + ")" for value in inputs)


def _exported(program: Any, inputs: list[Any], length: int) -> Any:
    import torch
    from torch.export.graph_signature import TensorArgument

    from cat_plugin.torch_compat import pytree, without_stack_traces

    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    tensors, shapes = [], []
    for value in inputs:
        free = not isinstance(value.shape[0], int)
        sizes = [s if isinstance(s, int) else length for s in value.shape[1:]]
        tensors.append(torch.zeros([2 if free else value.shape[0], *sizes], dtype=value.dtype))
        shapes.append({0: batch} if free else None)
    given = iter(tensors)
    kinds = [s.arg for s in program.graph_signature.input_specs if s.kind.name == "USER_INPUT"]
    leaves = [
        next(given) if isinstance(kind, TensorArgument) else getattr(kind, "value", None) for kind in kinds
    ]
    args, kwargs = pytree.tree_unflatten(leaves, program.call_spec.in_spec)
    collected: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor, shape in zip(tensors, shapes, strict=True):
        if shape is not None:
            collected[tensor] = shape
    module = program.module(check_guards=False)
    with torch.no_grad(), without_stack_traces():
        dynamic = collected.dynamic_shapes(module, args, kwargs)
        fixed = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic, strict=False)
    fixed.example_inputs = None
    return fixed
