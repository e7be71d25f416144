"""Export of any classifier to an :class:`torch.export.ExportedProgram` with a dynamic batch axis.

For a quantized module the result is the standard QDQ graph; nothing is lowered here, the module already computes with
explicit ``quantized_decomposed`` operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from cat_plugin.errors import CATTypeError, ExportError

__all__ = ["export_program"]


def _example(example_inputs: Any) -> Tensor:
    inputs = example_inputs
    while isinstance(inputs, list | tuple) and inputs:
        inputs = inputs[0]
    if not isinstance(inputs, Tensor):
        raise CATTypeError(
            f"example_inputs is a {type(example_inputs).__name__}; expected a tensor (N, ...) or a tuple of one."
        )
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
        (N, ...); only shape, dtype and device matter.

    Returns
    -------
    ExportedProgram
        Batch axis dynamic from 1 on; it holds no example inputs, so that what is saved has no pickled tensors.

    Raises
    ------
    ExportError
        Naming the operation or module that cannot be exported.
    """
    if not isinstance(module, nn.Module):
        raise CATTypeError(f"the module is a {type(module).__name__}; expected a torch.nn.Module.")
    obstacle = getattr(module, "export_obstacle", None)
    if obstacle is not None:
        raise ExportError(f"{type(module).__name__} cannot be exported: {obstacle}")
    example = _example(example_inputs)
    modes = [(m, m.training) for m in module.modules()]
    for child, _ in modes:
        child.training = False
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    try:
        with torch.no_grad():
            program = torch.export.export(module, (example,), dynamic_shapes=({0: batch},), strict=False)
    except Exception as error:
        raise ExportError(
            f"{type(module).__name__} cannot be exported for any batch size: {_reason(module, error)}"
        ) from error
    finally:
        for child, training in modes:
            child.training = training
    program.example_inputs = None
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
