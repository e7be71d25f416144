"""From the user's eager model to a plain ATen graph without side effects.

One front end for everything: :func:`torch.export.export`, non-strict, strict, and for a model that both refuse
:func:`torch.fx.symbolic_trace` first.  The result calls ATen operations on ``get_attr`` parameters, so that
``nn.ReLU()``, ``F.relu`` and ``x.relu_()`` are one thing to everything that reads it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn

from cat_plugin.errors import CATTypeError, QuantizationError
from cat_plugin.models import without_autocast
from cat_plugin.ptq.graph.plain import fold_constants, functional, plain

__all__ = ["trace"]

_log = logging.getLogger("cat_plugin")


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither torch's account of a refused export, which the next attempt may make good, nor attention's fast path.

    The latter would hide attention's linear layers in one operation.
    """
    loggers = [logging.getLogger(name) for name in ("torch._guards", "torch.fx.experimental.symbolic_shapes")]
    levels = [logger.level for logger in loggers]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _export(model: nn.Module, example: Tensor, *, strict: bool) -> fx.GraphModule:
    batch = torch.export.Dim("batch", min=1, max=65536)
    try:
        program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},), strict=strict)
    except TypeError as error:
        if "dynamic_shapes" not in str(error):
            raise
        program = torch.export.export(model, (example,), strict=strict)
    return functional(program)


def trace(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """Trace ``model`` into a graph of functional ATen calls with a dynamic batch axis.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode, taking one tensor and returning one.
    example : Tensor
        (N, ...) one input batch; its values do not matter.

    Returns
    -------
    fx.GraphModule
        Own copies of the parameters, what depends on them alone computed; one placeholder; one tensor as the result.

    Raises
    ------
    QuantizationError
        If no front end can trace the model with a dynamic batch, or its result is not one tensor.
    """
    if not isinstance(model, nn.Module):
        raise CATTypeError(f"the model is a {type(model).__name__}; expected a torch.nn.Module.")
    if len(example) == 1:  # a batch of one would be taken for a constant
        example = torch.cat([example, example])
    with torch.no_grad(), without_autocast():
        result = model(example.clone())
    if not isinstance(result, Tensor):
        raise QuantizationError(
            f"the model returns a {type(result).__name__}; expected one tensor. Wrap it in a module that returns "
            "the logits only."
        )
    if result.ndim < 1 or len(result) != len(example):
        raise QuantizationError(
            f"the model maps a batch of {len(example)} to a result of shape {tuple(result.shape)}; expected one "
            "row for each input."
        )
    module = plain(_first_that_works(model, example))
    fold_constants(module)
    return module


def _first_that_works(model: nn.Module, example: Tensor) -> fx.GraphModule:
    attempts: dict[str, Callable[[], fx.GraphModule]] = {
        "torch.export": lambda: _export(model, example, strict=False),
        "torch.export in strict mode": lambda: _export(model, example, strict=True),
        "torch.fx": lambda: _export(fx.symbolic_trace(model), example, strict=False),
    }
    errors: list[Exception] = []
    with _quiet(), torch.no_grad(), without_autocast():
        for name, attempt in attempts.items():
            try:
                module = attempt()
            except Exception as error:
                _log.debug("%s failed: %s", name, error)
                errors.append(error)
                continue
            if _keeps_batch(module):
                return module
    raise QuantizationError(_refusal(model, errors)) from (errors[0] if errors else None)


def _keeps_batch(module: fx.GraphModule) -> bool:
    """Whether the first axis of input and output is the same symbol."""
    source = next(n for n in module.graph.nodes if n.op == "placeholder").meta.get("val")
    output = next(n for n in module.graph.nodes if n.op == "output").args[0]
    while isinstance(output, list | tuple) and len(output) == 1:
        output = output[0]
    result = output.meta.get("val") if isinstance(output, fx.Node) else None
    if not isinstance(source, Tensor) or not isinstance(result, Tensor):
        return True
    return not isinstance(source.shape[0], int) and str(source.shape[0]) == str(result.shape[0])


def _refusal(model: nn.Module, errors: list[Exception]) -> str:
    kind = type(model).__name__
    place = next((found for error in reversed(errors) if (found := _line(str(error)))), None)
    where = f" at {place}" if place else ""
    if not errors or any("specialized it to be a constant" in str(error) for error in errors):
        return (
            f"the model ({kind}) fixes the batch size{where}; expected code that takes any number of rows. Write "
            "x.shape[0] or -1 where the number stands, and neither int() nor len() around it."
        )
    reason = " ".join(str(errors[0]).split())
    return (
        f"the model ({kind}) can be traced neither by torch.export nor by torch.fx{where}: {reason:.300}. Remove control "
        "flow that depends on the data, or code that fixes the batch size."
    )


def _line(message: str) -> str | None:
    """The last line of the caller's code that a message of torch's names, as ``file, line n: code``."""
    found = re.findall(r'File "([^"]+)", line (\d+), in [^\n]+\n\s*([^\n]+)', message)
    own = [(path, number, code) for path, number, code in found if "/torch/" not in path]
    if not own:
        return None
    path, number, code = own[-1]
    return f"{path}, line {number}: {code.strip()}"
