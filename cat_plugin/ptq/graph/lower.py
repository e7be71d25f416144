"""From calibrated quantizer modules to the explicit QDQ graph that is handed over.

The result computes with ``quantized_decomposed.{quantize,dequantize}_per_{tensor,channel,token}`` on integer weight
buffers; scales and zero points of activations are constants in the graph, or computed there from each token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from cat_plugin.ptq.graph.interface import Interface
from cat_plugin.ptq.graph.lengths import any_length
from cat_plugin.ptq.graph.modules import LEAST_MODULATION, QuantOp
from cat_plugin.ptq.graph.ops import is_call
from cat_plugin.ptq.quantizers.per_token import LEAST_SCALE, TokenQuantizer
from cat_plugin.ptq.quantizers.tables import TableQuantizer
from cat_plugin.ptq.quantizers.uniform import ActQuantizer
from cat_plugin.ptq.transforms.equalization import Ceiling
from cat_plugin.torch_compat import register_quantized_decomposed

__all__ = ["lower"]

register_quantized_decomposed()
_aten = torch.ops.aten
_qd = torch.ops.quantized_decomposed


def lower(module: fx.GraphModule) -> tuple[fx.GraphModule, dict[str, str]]:
    """Write the QDQ graph of a calibrated module.

    Parameters
    ----------
    module : fx.GraphModule
        Prepared and calibrated; left as it is.

    Returns
    -------
    lowered : fx.GraphModule
        In evaluation mode, weights as int8 buffers, biases as float32.
    counterparts : dict of str to str
        Names of its nodes, and for each the first node of `module` that has the same value; in order of execution.
    """
    root = nn.Module()
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    pairs: dict[tuple[Any, ...], fx.Node] = {}

    def buffer(name: str, value: torch.Tensor) -> fx.Node:
        """Store `value` where the original model keeps it, so that names survive into what is exported."""
        *path, leaf = name.split(".")
        owner = root
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        while hasattr(owner, leaf):  # a module that the model calls twice is quantized twice
            leaf += "_"
        owner.register_buffer(leaf, value.detach().clone().contiguous())
        return graph.create_node("get_attr", ".".join([*path, leaf]))

    for node in module.graph.nodes:
        child = module.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(child, ActQuantizer):
            source = env[node.args[0]]
            if isinstance(child, TableQuantizer) and child.ready:
                tables = [
                    buffer(f"{node.target}.{name}", getattr(child, name)) for name in ("borders", "levels")
                ]
                env[node] = _from_table(graph, source, *tables)
            else:
                env[node] = _activation(graph, source, child, pairs)
        elif isinstance(child, QuantOp):
            if child.q_weight is None:
                weight = buffer(f"{child.name}.weight", child.weight)
            else:
                parts = {
                    "weight": child.q_weight,
                    "weight_scale": child.scale,
                    "weight_zero_point": child.zero_point,
                }
                stored = tuple(buffer(f"{child.name}.{part}", value) for part, value in parts.items())
                weight = _weight(graph, child, stored)
                if child.left is not None and child.right is not None:
                    sides = {"left": child.left, "right": child.right}
                    vectors = [buffer(f"{child.name}.weight_{side}", value) for side, value in sides.items()]
                    weight = _modulated(graph, weight, *vectors)
            bias = None if child.bias is None else buffer(f"{child.name}.bias", child.bias.float())
            env[node] = graph.call_function(child.target, (env[node.args[0]], weight, bias, *child.extra))
            env[node].meta["nn_module_stack"] = {"0": (child.name, nn.Module)}
        elif isinstance(child, Ceiling):
            env[node] = graph.call_function(torch.ops.aten.relu6.default, (env[node.args[0]],))
        elif is_call(node, {torch.ops.aten.addcmul.default}):
            shift, source, factor = (env[n] for n in node.args)
            scaled = graph.call_function(torch.ops.aten.mul.Tensor, (source, factor))
            env[node] = graph.call_function(torch.ops.aten.add.Tensor, (scaled, shift))
        else:
            if node.op == "get_attr":
                value = getattr(module, node.target)
                if isinstance(value, torch.Tensor):
                    root.register_buffer(node.target, value.detach().clone())
                else:
                    setattr(root, node.target, value)
            env[node] = graph.node_copy(node, lambda n: env[n])
            env[node].meta = {}
    counterparts: dict[str, str] = {}
    for node, lowered in env.items():
        counterparts.setdefault(lowered.name, node.name)
    any_length(graph, env)
    interface = module.meta.get("interface")
    if isinstance(interface, Interface):
        interface.restore(graph)
    result = fx.GraphModule(root, graph, class_name="QuantizedModel")
    if isinstance(interface, Interface) and interface.named:
        result.meta["output_names"] = list(interface.outputs)
    result.graph.eliminate_dead_code()
    result.graph.lint()
    result.recompile()
    return result.eval(), counterparts


def _weight(graph: fx.Graph, layer: QuantOp, stored: tuple[fx.Node, ...]) -> fx.Node:
    if layer.group is None:
        arguments: tuple[Any, ...] = (*stored, 0, *layer.qrange, torch.int8)
        return graph.call_function(_qd.dequantize_per_channel.default, arguments)
    arguments = (*stored, *layer.qrange, torch.int8, layer.group, torch.float32)
    return graph.call_function(_qd.dequantize_per_channel_group.default, arguments)


def _modulated(graph: fx.Graph, weight: fx.Node, left: fx.Node, right: fx.Node) -> fx.Node:
    """:func:`~cat_plugin.ptq.graph.modules.modulation` in the graph, times the weight."""
    product = graph.call_function(_aten.matmul.default, (left, right))
    factor = graph.call_function(_aten.clamp.default, (product,), {"min": LEAST_MODULATION})
    return graph.call_function(_aten.mul.Tensor, (weight, factor))


def _token_grid(graph: fx.Graph, source: fx.Node, quantizer: TokenQuantizer) -> tuple[fx.Node, fx.Node]:
    """:func:`~cat_plugin.ptq.quantizers.per_token.token_grid` in the graph; zero points as integers."""

    def call(target: Any, *arguments: Any, **keywords: Any) -> fx.Node:
        return graph.call_function(target, arguments, keywords)

    ends = []
    for extreme, bound in ((_aten.amin.default, {"max": 0.0}), (_aten.amax.default, {"min": 0.0})):
        end = call(_aten.clamp.default, call(extreme, source, [-1], True), **bound)
        ends.append(call(_aten.mul.Tensor, end, float(quantizer.scale)))
    low, high = ends
    width = call(_aten.mul.Tensor, call(_aten.sub.Tensor, high, low), 1.0 / quantizer.qrange[1])
    scale = call(_aten.clamp.default, width, min=LEAST_SCALE)
    ratio = call(_aten.div.Tensor, call(_aten.neg.default, low), scale)
    return scale, call(_aten.to.dtype, call(_aten.round.default, ratio), torch.int64)


def _from_table(graph: fx.Graph, source: fx.Node, borders: fx.Node, levels: fx.Node) -> fx.Node:
    """The number of borders that a value has reached, and the level of that number."""
    place = graph.call_function(torch.ops.aten.bucketize.Tensor, (source, borders), {"right": True})
    return graph.call_function(torch.ops.aten.index.Tensor, (levels, [place]))


def _activation(
    graph: fx.Graph, source: fx.Node, quantizer: ActQuantizer, pairs: dict[tuple[Any, ...], fx.Node]
) -> fx.Node:
    if not quantizer.ready:
        return source
    if isinstance(quantizer, TokenQuantizer):
        own = (*_token_grid(graph, source, quantizer), *quantizer.qrange, torch.uint8)
        integers = graph.call_function(_qd.quantize_per_token.default, (source, *own))
        return graph.call_function(_qd.dequantize_per_token.default, (integers, *own, torch.float32))
    dtype = torch.int8 if quantizer.signed else torch.uint8
    grid = (float(quantizer.scale), quantizer.zero_point, *quantizer.qrange, dtype)
    key = (source, *grid)
    if key not in pairs:
        integers = graph.call_function(_qd.quantize_per_tensor.default, (source, *grid))
        pairs[key] = graph.call_function(_qd.dequantize_per_tensor.default, (integers, *grid))
    return pairs[key]
