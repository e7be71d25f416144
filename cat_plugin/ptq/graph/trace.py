"""From the user's eager model to a plain ATen graph without side effects.

One front end for everything: :func:`torch.export.export`, non-strict, strict, and for a model that both refuse
:func:`torch.fx.symbolic_trace` first.  The result calls ATen operations on ``get_attr`` parameters, so that
``nn.ReLU()``, ``F.relu`` and ``x.relu_()`` are one thing to everything that reads it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from cat_plugin.errors import CATTypeError, QuantizationError
from cat_plugin.models import without_autocast
from cat_plugin.ptq.graph.functional import functional
from cat_plugin.ptq.graph.interface import Interface
from cat_plugin.ptq.graph.ops import output_leaves
from cat_plugin.ptq.graph.plain import fold_constants, plain, select_by_number
from cat_plugin.ptq.graph.spelled_out import join_pieces
from cat_plugin.ptq.rows import Inputs
from cat_plugin.structures import as_structure, leaves_of
from cat_plugin.torch_compat import without_stack_traces

__all__ = ["refuse_random", "trace"]

_log = logging.getLogger("cat_plugin")
_DRAWS = (
    "rand", "bernoulli", "binomial", "normal", "log_normal", "multinomial", "uniform", "exponential", "geometric", "cauchy",
    "poisson", "_standard_gamma", "_sample_dirichlet",
)  # fmt: skip
"""What names of operations begin with that draw random numbers, in evaluation too; torch's own tag also has dropout and attention."""


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


def _export(model: nn.Module, example: Inputs, *, strict: bool) -> fx.GraphModule:
    module = functional(_exported(model, example, strict=strict))
    # Writing into parts of a tensor makes torch forget that the batch varies; seen anew, sizes are what they are.
    if select_by_number(module) or not _batch_is_free(module):
        module = functional(_exported(module, example, strict=False))
    return module


def _exported(model: nn.Module, example: Inputs, *, strict: bool) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=65535)
    call = example.call
    rows: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor in call.tensors:
        rows[tensor] = {0: batch}
    try:
        shapes = rows.dynamic_shapes(model, call.args, call.kwargs)
        return torch.export.export(model, call.args, call.kwargs, dynamic_shapes=shapes, strict=strict)
    except TypeError as error:
        if "dynamic_shapes" not in str(error):
            raise
        return torch.export.export(model, call.args, call.kwargs, strict=strict)


def _batch_is_free(module: fx.GraphModule) -> bool:
    """Whether the first axis of every input is a symbol that has no value."""
    values = [n.meta.get("val") for n in module.graph.nodes if n.op == "placeholder"]
    return all(str(value.shape[0]).isidentifier() for value in values if isinstance(value, Tensor))


@contextmanager
def _returning_structures(model: nn.Module) -> Iterator[None]:
    """Results of classes that the exporter does not know come out as dicts."""
    handle = model.register_forward_hook(lambda _module, _inputs, result: as_structure(result))
    try:
        yield
    finally:
        handle.remove()


def trace(model: nn.Module, example: Tensor | Inputs) -> fx.GraphModule:
    """Trace ``model`` into a graph of functional ATen calls with a dynamic batch axis.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode.
    example : Tensor or Inputs
        One batch (N, ...) of each of its inputs; its values do not matter.

    Returns
    -------
    fx.GraphModule
        Own copies of the parameters, what depends on them alone computed; a placeholder for each tensor among the
        arguments; the tensor that the model returns, or the list of the leaves of what it returns.  How the model is called
        and what it returns is in ``meta["interface"]``.

    Raises
    ------
    QuantizationError
        If no front end can trace the model with a dynamic batch, or no tensor of its result has a row for each input.
    """
    if not isinstance(model, nn.Module):
        raise CATTypeError(f"the model is a {type(model).__name__}; expected a torch.nn.Module.")
    # A batch of one would be taken for a constant, and one tensor given twice for one input.
    example = Inputs.of(example)
    example = example.mapped(lambda x: torch.cat([x, x]) if len(x) == 1 else x.clone())
    call = example.call
    with torch.no_grad(), without_autocast():
        result = as_structure(model(*call.copied().args, **call.copied().kwargs))
    _check_result(result, len(example))
    with contextlib.ExitStack() as stack:
        if not isinstance(result, Tensor):
            stack.enter_context(_returning_structures(model))
        found = _first_that_works(model, example)
    module = plain(found)
    fold_constants(module)
    join_pieces(module)
    module.meta["interface"] = Interface.of(model, example, result, found.graph)
    return module


def refuse_random(module: fx.GraphModule) -> None:
    """Refuse numbers drawn from one seed at every call: a graph holds no generator, and would draw others each time.

    Raises
    ------
    QuantizationError
        If an operation of the graph draws random numbers.
    """
    for node in module.graph.nodes:
        name = str(node.target).removeprefix("aten.")
        if node.op == "call_function" and name.startswith(_DRAWS):
            raise QuantizationError(
                f"the model draws random numbers where it is called ({node.target}); a graph draws others at every call. Draw "
                "them once, in __init__, and keep them with register_buffer."
            )


def _check_result(result: Any, rows: int) -> None:
    leaves = [leaf for leaf in leaves_of(result) if isinstance(leaf, Tensor)]
    if any(leaf.ndim and len(leaf) == rows and leaf.is_floating_point() for leaf in leaves):
        return
    if leaves and not any(leaf.is_floating_point() for leaf in leaves):
        kind = str(leaves[0].dtype).removeprefix("torch.")
        raise QuantizationError(
            f"the model returns {kind} alone; expected real numbers, whose error can be measured. Return what it chooses by, such as "
            "the logits in front of an argmax, as well."
        )
    if isinstance(result, Tensor):
        raise QuantizationError(
            f"the model maps a batch of {rows} to a result of shape {tuple(result.shape)}; expected one "
            "row for each input."
        )
    raise QuantizationError(
        f"the model returns a {type(result).__name__}, in which no tensor of real numbers has a row for each of {rows} "
        "inputs; expected one tensor, or a tuple, list or dict of them."
    )


def _first_that_works(model: nn.Module, example: Inputs) -> fx.GraphModule:
    attempts: dict[str, Callable[[], fx.GraphModule]] = {
        "torch.export": lambda: _export(model, example, strict=False),
        "torch.export in strict mode": lambda: _export(model, example, strict=True),
        "torch.fx": lambda: _export(fx.symbolic_trace(model), example, strict=False),
    }
    errors: list[Exception] = []
    with _quiet(), without_stack_traces(), torch.no_grad(), without_autocast():
        for name, attempt in attempts.items():
            said = io.StringIO()  # torch prints what it has of a graph that it gives up
            try:
                with contextlib.redirect_stderr(said):
                    module = attempt()
            except Exception as error:
                _log.debug("%s failed: %s", name, error)
                errors.append(error)
                continue
            sys.stderr.write(said.getvalue())
            if _keeps_batch(module):
                return module
    raise QuantizationError(_refusal(model, errors)) from (errors[0] if errors else None)


def _keeps_batch(module: fx.GraphModule) -> bool:
    """Whether the first axis of the inputs, and of what is computed from them for each row, is the same symbol."""
    inputs = [n.meta.get("val") for n in module.graph.nodes if n.op == "placeholder"]
    sources = [value for value in inputs if isinstance(value, Tensor)]
    if not sources:
        return True
    if not _batch_is_free(module):
        return False
    batch = str(sources[0].shape[0])
    return any(
        isinstance(value := leaf.meta.get("val"), Tensor) and value.ndim and str(value.shape[0]) == batch
        for leaf in output_leaves(module.graph)
        if isinstance(leaf, fx.Node)
    )


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
