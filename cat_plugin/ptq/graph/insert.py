"""Where the quantizers go: turns an ATen graph into one of quantized operations and activation quantizers.

Every input of a convolution or linear layer gets a quantizer at the layer's bits; every tensor that enters an
element-wise operation of two tensors, a concatenation or a pooling one at ``residual_bits``, unless grids are those of single
tokens, which only products can use, or what comes of it is read by a norm, a softmax or a product of attention: these
compute in float, and the stream between the blocks of a transformer has channels of a range so much wider than all others'
that 8 bits for the whole tensor lose it.  Inputs that are made ready, what is reckoned from whole numbers, and what is compared with
what it was selected from stay in float, too.  Quantizers of one tensor with the same bits are shared, those with different bits
stand side by side, each reading the float value.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from cat_plugin.errors import QuantizationError
from cat_plugin.ptq.graph.modules import QuantOp
from cat_plugin.ptq.graph.ops import (
    BATCH_NORM,
    COMBINING,
    COMPARING,
    FLOAT_ONLY,
    JOINING,
    KEEPING_EQUAL,
    KIND,
    MOVING,
    NORMS,
    PRODUCTS,
    SOFTMAX,
    WEIGHTED,
    arguments,
    constant,
    is_call,
    is_depthwise,
    layer_name,
    operand,
    weight_of,
)
from cat_plugin.ptq.quantizers.logarithmic import LogQuantizer
from cat_plugin.ptq.quantizers.per_token import TokenQuantizer
from cat_plugin.ptq.quantizers.tables import FittedQuantizer, TableQuantizer
from cat_plugin.ptq.quantizers.uniform import ActQuantizer
from cat_plugin.ptq.spec import QuantSpec

__all__ = ["Prepared", "group_of", "insert_quantizers", "layer_widths"]


#: What stands for the bits of an activation that is not quantized.
FLOAT_BITS = 32
#: Grids of the softmax's result, but for the uniform one.
TABLES: dict[str, type[TableQuantizer]] = {"logarithmic": LogQuantizer, "fitted": FittedQuantizer}


@dataclass
class Prepared:
    """A graph ready for calibration.

    Attributes
    ----------
    module : fx.GraphModule
        ``call_module`` nodes for :class:`QuantOp` and :class:`ActQuantizer`, ATen calls otherwise.
    layers : list of QuantOp
        In the order of execution.
    unquantized : list of str
        What stays in float, each with the reason.
    """

    module: fx.GraphModule
    layers: list[QuantOp] = field(default_factory=list)
    unquantized: list[str] = field(default_factory=list)


class _Placer:
    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.cache: dict[tuple[fx.Node, int], fx.Node] = {}

    def quantized(self, source: fx.Node, bits: int, kind: type[ActQuantizer] = ActQuantizer) -> fx.Node:
        """The quantizer of ``source`` at ``bits``, made on first use right behind its source."""
        key = (source, bits)
        if key not in self.cache:
            name = f"act_{source.name}_{bits}bit"
            self.module.add_submodule(name, kind(bits))
            with self.module.graph.inserting_after(source):
                node = self.module.graph.call_module(name, (source,))
            node.meta = dict(source.meta)
            self.cache[key] = node
        return self.cache[key]


def _is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)


def _operands(node: fx.Node) -> list[fx.Node]:
    items: list[Any] = []
    for arg in node.args:
        items += list(arg) if isinstance(arg, list | tuple) else [arg]
    return [a for a in items if _is_tensor(a) and a.op != "get_attr" and a.meta["val"].dtype == torch.float32]


def _hoisted(value: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Source to quantize instead of ``value``, and the node that reads it: past what only moves values."""
    reader, source = value, value
    while (
        is_call(source, MOVING)
        and len(source.users) == 1
        and _is_tensor(source.args[0])
        and operand(source).op != "get_attr"
    ):
        reader, source = source, operand(source)
    return source, reader


def _ends(graph: fx.Graph, weighted: list[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """Weighted nodes before which, and behind which, no other weighted node stands."""
    chosen = set(weighted)
    behind: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        behind[node] = any(behind[p] or p in chosen for p in node.all_input_nodes)
    ahead: dict[fx.Node, bool] = {}
    for node in reversed(graph.nodes):
        ahead[node] = any(ahead[u] or u in chosen for u in node.users)
    return {n for n in weighted if not behind[n]}, {n for n in weighted if not ahead[n]}


def insert_quantizers(module: fx.GraphModule, spec: QuantSpec) -> Prepared:
    """Replace weighted operations by :class:`QuantOp` and place activation quantizers, in place.

    Parameters
    ----------
    module : fx.GraphModule
        BatchNorm-folded ATen graph.
    spec : QuantSpec
        Bit-widths and exceptions.

    Returns
    -------
    Prepared
        The same module, its layers and what was left out.

    Raises
    ------
    QuantizationError
        If the model has nothing to quantize.
    CATValueError
        If a pattern in ``skip`` or ``overrides`` matches no layer.
    """
    graph, prepared, placer = module.graph, Prepared(module), _Placer(module)
    _replace_layers(prepared, placer, spec)
    if not prepared.layers:
        raise QuantizationError(
            "the model has no convolution or linear layer to quantize; check the model and the patterns in "
            "'skip' and 'overrides'."
        )
    per_token = spec.a_granularity == "token"
    if not spec.weight_only and not per_token:
        _quantize_joined(module, placer, spec)
    for node in list(graph.nodes):
        if is_call(node, PRODUCTS) and any(n.op == "get_attr" for n in node.all_input_nodes):
            prepared.unquantized.append(f"{layer_name(node)} ({node.target}): a product with a constant")
        elif is_call(node, PRODUCTS) and spec.attention_bits is not None and not spec.weight_only:
            for factor in dict.fromkeys(arguments(node)[: PRODUCTS[node.target]]):
                table = TABLES.get(spec.grid_of_softmax) if _is_softmax(factor) else None
                kind = table or (TokenQuantizer if per_token else ActQuantizer)
                node.replace_input_with(factor, placer.quantized(factor, spec.attention_bits, kind))
        elif is_call(node, PRODUCTS) or is_call(node, FLOAT_ONLY):
            prepared.unquantized.append(f"{layer_name(node)} ({node.target}): computed in float")
    prepared.unquantized += [
        f"{layer_name(node)} (batch_norm): no convolution or linear layer to fold it into"
        for node in graph.nodes
        if is_call(node, BATCH_NORM)
    ]
    graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    graph.lint()
    module.recompile()
    return prepared


def _replace_layers(prepared: Prepared, placer: _Placer, spec: QuantSpec) -> None:
    """A :class:`QuantOp` behind a quantizer of its input in the place of every layer that is to have bits."""
    module, graph = prepared.module, prepared.module.graph
    for node, (name, bits) in layer_widths(module, spec).items():
        if operand(node, 1).op != "get_attr":
            prepared.unquantized.append(
                f"{name} ({KIND[node.target]}): its weight is computed, not a parameter"
            )
            continue
        if bits is None:
            prepared.unquantized.append(f"{name} ({KIND[node.target]}): left in float by the specification")
            continue
        bias = constant(module, node.args[2]) if len(node.args) > 2 else None
        weight = weight_of(module, node)
        if weight.dtype != torch.float32:
            kind = str(weight.dtype).removeprefix("torch.")
            prepared.unquantized.append(f"{name} ({KIND[node.target]}): computes in {kind}")
            continue
        group = group_of(weight.shape[1], spec.weight_groups) if weight.ndim == 2 else None
        vectors = node.meta.get("rotation_vectors")
        layer = QuantOp(name, node.target, weight, bias, arguments(node)[3:], *bits, group, vectors)
        layer.bounded = spec.bounded_sums
        if spec.weight_only:
            layer.a_bits = FLOAT_BITS
        prepared.layers.append(layer)
        module.add_submodule(f"op_{node.name}", layer)
        with graph.inserting_before(node):
            source = operand(node)
            per_token = spec.a_granularity == "token" and weight.ndim == 2
            given = (
                source
                if spec.weight_only
                else placer.quantized(source, bits[1], TokenQuantizer if per_token else ActQuantizer)
            )
            new = graph.call_module(f"op_{node.name}", (given,))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        # a source may be a weighted node met earlier; the cache is keyed by live nodes only
        graph.erase_node(node)


def group_of(features: int, asked: int | None) -> int | None:
    """Input features that share a scale: as many as were asked for, or the next fewer that divide them; None is all."""
    if asked is None or asked >= features:
        return None
    return next(size for size in range(asked, 0, -1) if features % size == 0)


def layer_widths(
    module: fx.GraphModule, spec: QuantSpec
) -> dict[fx.Node, tuple[str, tuple[int, int] | None]]:
    """Weighted node, in order of execution -> its name, and the bits of weights and input (None leaves it in float)."""
    graph = module.graph
    candidates = [n for n in graph.nodes if is_call(n, WEIGHTED)]
    first, last = _ends(graph, [n for n in candidates if operand(n, 1).op == "get_attr"])
    names = _names(candidates)
    if names:
        spec.check_patterns(names.values())
    return {
        node: (
            name,
            spec.layer_bits(
                name, first=node in first, last=node in last, depthwise=is_depthwise(module, node)
            ),
        )
        for node, name in names.items()
    }


def _names(layers: list[fx.Node]) -> dict[fx.Node, str]:
    """A name for each layer; of a module that is called several times each call has its own, as it has its own integers."""
    calls: Counter[str] = Counter()
    names: dict[fx.Node, str] = {}
    for node in layers:
        name = layer_name(node)
        calls[name] += 1
        names[node] = name if calls[name] == 1 else f"{name}@{calls[name]}"
    return names


def _is_softmax(node: Any) -> bool:
    """Whether the node's values are shares that a softmax made, or zeros in their place."""
    while is_call(node, MOVING | {torch.ops.aten.masked_fill.Scalar}):
        node = operand(node)
    return is_call(node, SOFTMAX)


def _float_streams(graph: fx.Graph) -> set[fx.Node]:
    """What a norm, a softmax or a product reads, at once or joined with other things and moved."""
    readers = {*NORMS, *SOFTMAX, *PRODUCTS}
    streams: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if is_call(node, COMBINING | MOVING) and any(is_call(u, readers) or u in streams for u in node.users):
            streams.add(node)
    return streams


def _compared(graph: fx.Graph) -> set[fx.Node]:
    """What reaches a comparison, often with what it was selected from: rounded on one side only, nothing would be equal."""
    found: set[fx.Node] = set()
    left = [source for node in graph.nodes if is_call(node, COMPARING) for source in node.all_input_nodes]
    while left:
        node = left.pop()
        if is_call(node, KEEPING_EQUAL) and node not in found:
            found.add(node)
            left += node.all_input_nodes
    return found


def _from_layers(module: fx.GraphModule) -> set[fx.Node]:
    """Real numbers that a layer had a part in.

    Others are the caller's inputs made ready, or reckoned from whole numbers: times, positions, places.  Where these are normalised,
    multiplied by frequencies or made indices of, one step of 8 bits may be all that they say.
    """
    found: set[fx.Node] = set()
    for node in module.graph.nodes:
        value = node.meta.get("val")
        real = not isinstance(value, Tensor) or value.is_floating_point()
        layer = is_call(node, WEIGHTED | FLOAT_ONLY) or (
            node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), QuantOp)
        )
        if real and (layer or any(each in found for each in node.all_input_nodes)):
            found.add(node)
    return found


def _quantize_joined(module: fx.GraphModule, placer: _Placer, spec: QuantSpec) -> None:
    """A quantizer for every tensor that enters an operation that joins."""
    input_bits = {source: width for source, width in placer.cache if source.op == "placeholder"}
    streams, compared = _float_streams(module.graph), _compared(module.graph)
    computed = _from_layers(module)
    for node in list(module.graph.nodes):
        if not is_call(node, JOINING) or node in streams or node in compared:
            continue
        if not computed.intersection(node.all_input_nodes):
            continue
        for value in _operands(node):
            source, reader = _hoisted(value)
            if source.op == "call_module" and isinstance(
                module.get_submodule(str(source.target)), ActQuantizer
            ):
                continue
            own = source.op == "call_module" or is_call(source, WEIGHTED)
            width = input_bits.get(source, spec.branch_bits if own else spec.residual_bits)
            quantizer = placer.quantized(source, width)
            if reader is source:
                node.replace_input_with(source, quantizer)
            else:
                reader.replace_input_with(source, quantizer)
