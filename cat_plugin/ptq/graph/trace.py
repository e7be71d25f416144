"""From the user's eager model to a plain ATen graph without side effects.

One front end for everything: :func:`torch.export.export`, and for a model it refuses
:func:`torch.fx.symbolic_trace` first.  The result calls ATen operations on ``get_attr`` parameters, so that
``nn.ReLU()``, ``F.relu`` and ``x.relu_()`` are one thing to everything that reads it.
"""

from __future__ import annotations

import copy
import logging

import torch
from torch import Tensor, fx, nn

from cat_plugin.errors import CATTypeError, QuantizationError
from cat_plugin.ptq.graph.ops import INPLACE, MOVING, is_call

__all__ = ["trace"]

_log = logging.getLogger("cat_plugin")
_aten = torch.ops.aten


def _export(model: nn.Module, example: Tensor) -> fx.GraphModule:
    batch = torch.export.Dim("batch", min=1, max=65536)
    try:
        program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},), strict=False)
    except TypeError as error:
        if "dynamic_shapes" not in str(error):
            raise
        program = torch.export.export(model, (example,), strict=False)
    return program.module(check_guards=False)


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
        Own copies of the parameters; one placeholder; one tensor as the result.

    Raises
    ------
    QuantizationError
        If neither front end can trace the model, or its result is not one tensor.
    """
    if not isinstance(model, nn.Module):
        raise CATTypeError(f"the model is a {type(model).__name__}; expected a torch.nn.Module.")
    if len(example) == 1:  # a batch of one would be taken for a constant
        example = torch.cat([example, example])
    with torch.no_grad():
        result = model(example)
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
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it would hide attention's linear layers in one operation
    try:
        graph_module = _export(model, example)
    except Exception as error:
        _log.debug("torch.export failed, trying torch.fx first: %s", error)
        try:
            graph_module = _export(fx.symbolic_trace(model), example)
        except Exception:
            raise QuantizationError(
                f"the model ({type(model).__name__}) can be traced neither by torch.export nor by torch.fx: {error}. "
                "Remove control flow that depends on the data, or code that fixes the batch size."
            ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return _plain(graph_module)


def _plain(module: fx.GraphModule) -> fx.GraphModule:
    """Copy into a GraphModule of ours: plain calling convention, no dead or identity nodes, no mutation."""
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    if len(placeholders) != 1:
        raise QuantizationError(
            f"the model takes {len(placeholders)} inputs; expected one tensor. Wrap it in a module of one input."
        )
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    root = nn.Module()
    for node in module.graph.nodes:
        if node.op == "output":
            value = node.args[0]
            while isinstance(value, list | tuple) and len(value) == 1:
                value = value[0]
            if not isinstance(value, fx.Node):
                raise QuantizationError("the model returns several values; expected one tensor of logits.")
            graph.output(env[value])
            continue
        if is_call(node, {_aten.dropout.default, _aten.dropout_.default, _aten.feature_dropout.default}):
            env[node] = env[node.args[0]]
            continue
        if (
            is_call(node, {_aten.slice.Tensor})
            and len(node.args) == 4
            and node.args[2] == 0
            and (isinstance(node.args[3], int) and node.args[3] >= 2**62)
        ):
            env[node] = env[node.args[0]]  # x[:] of a whole axis
            continue
        if node.op == "get_attr":
            name = node.target.replace(".", "_")
            value = _attribute(module, node.target)
            if isinstance(value, Tensor):
                root.register_buffer(name, value.detach().clone().contiguous())
            else:
                setattr(root, name, copy.deepcopy(value))
            env[node] = graph.create_node("get_attr", name)
            env[node].meta = dict(node.meta)
            env[node].meta["source"] = node.target
            continue
        new = graph.node_copy(node, lambda n: env[n])
        env[node] = new
        if is_call(new, INPLACE):
            new.target = INPLACE[new.target]
            # whoever reads the mutated tensor later reads the new value
            for old, copied in list(env.items()):
                if copied is env[node.args[0]] and old is not node:
                    env[old] = new
        _static_sizes(new)
    result = fx.GraphModule(root, graph)
    result.graph.eliminate_dead_code()
    result.recompile()
    return result.eval()


def _attribute(module: nn.Module, target: str) -> object:
    value: object = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _static_sizes(node: fx.Node) -> None:
    """Write -1 for the one symbolic size of a reshape, so that no symbol flows through the graph."""
    if not is_call(node, MOVING) or node.target not in (_aten.view.default, _aten.reshape.default):
        return
    shape = node.meta["val"].shape
    symbolic = [i for i, size in enumerate(shape) if not isinstance(size, int)]
    if len(symbolic) <= 1:
        node.args = (node.args[0], [-1 if i in symbolic else int(size) for i, size in enumerate(shape)])
