"""A unit of the graph made differentiable: runs its nodes with trained weights and steps, or in full precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, fx

from cat_plugin.ptq.graph.modules import QuantOp
from cat_plugin.ptq.graph.ops import is_batch_size, operand
from cat_plugin.ptq.graph.units import Unit
from cat_plugin.ptq.learned.descent import Snapshots
from cat_plugin.ptq.learned.precision import compute_in_bf16
from cat_plugin.ptq.learned.soft_layer import SoftLayer
from cat_plugin.ptq.learned.steps import SoftActivation
from cat_plugin.ptq.quantizers.tables import TableQuantizer
from cat_plugin.ptq.quantizers.uniform import ActQuantizer
from cat_plugin.ptq.rows import Rows
from cat_plugin.ptq.transforms.equalization import Ceiling

__all__ = ["SoftUnit", "Written", "float_call", "run_float", "run_float_rows", "run_nodes"]


def run_nodes(
    module: fx.GraphModule,
    nodes: Sequence[fx.Node],
    env: dict[fx.Node, Any],
    call: Callable[[Any, Tensor], Any],
    instead: Mapping[fx.Node, Callable[..., Any]] | None = None,
) -> None:
    """Execute ``nodes`` in order on the values in ``env``; ``call`` runs layers and quantizers.

    Nodes outside the list (constants, batch sizes, what is computed from another input) are evaluated when they are read.
    ``instead`` has functions that take the place of some nodes' operations, with the same arguments.
    """
    functions = {} if instead is None else instead
    count = len(next(iter(env.values())))
    for node in nodes:
        if node.op != "get_attr" and not is_batch_size(node):
            env[node] = _result(node, module, env, count, call, functions.get(node))


def _result(
    node: fx.Node,
    module: fx.GraphModule,
    env: dict[fx.Node, Any],
    count: int,
    call: Callable[[Any, Tensor], Any],
    function: Callable[..., Any] | None = None,
) -> Any:
    if node.op == "call_module":
        x = _value(operand(node), module, env, count, call)
        return call(module.get_submodule(str(node.target)), x)
    arguments: Any = fx.node.map_arg((node.args, node.kwargs), lambda n: _value(n, module, env, count, call))
    target: Any = node.target if function is None else function
    return target(*arguments[0], **arguments[1])


def _value(
    node: fx.Node,
    module: fx.GraphModule,
    env: dict[fx.Node, Any],
    count: int,
    call: Callable[[Any, Tensor], Any],
) -> Any:
    # not a closure that calls itself: such a cycle keeps a step's activations until the garbage collector comes by
    if node not in env:
        if is_batch_size(node):
            return count
        if node.op == "get_attr":
            return getattr(module, str(node.target))
        env[node] = _result(node, module, env, count, call)
    return env[node]


def float_call(child: Any, x: Tensor) -> Any:
    """What a layer or quantizer of a prepared graph does in full precision."""
    if isinstance(child, QuantOp):
        return child.compute(x, child.float_weight, child.float_bias)
    return child.full_precision(x) if isinstance(child, Ceiling) else x


def run_float(
    module: fx.GraphModule, nodes: Sequence[fx.Node], source: fx.Node, x: Tensor, output: fx.Node
) -> Tensor:
    """Value of ``output`` in full precision when ``source`` has the value ``x``."""
    env: dict[fx.Node, Any] = {source: x}
    run_nodes(module, nodes, env, float_call)
    result: Tensor = env[output]
    return result


def run_float_rows(
    module: fx.GraphModule,
    nodes: Sequence[fx.Node],
    values: Mapping[fx.Node, Tensor],
    outputs: Sequence[fx.Node],
) -> Rows:
    """Values of ``outputs`` in full precision when some nodes have the ``values``."""
    env: dict[fx.Node, Any] = dict(values)
    run_nodes(module, nodes, env, float_call)
    return Rows([env[node] for node in outputs])


def _copied(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.clone()


Soft = TypeVar("Soft", bound=SoftLayer)


class SoftUnit(Snapshots, Generic[Soft]):
    """A unit with what is trained of its layers and quantizers.

    Parameters
    ----------
    module : fx.GraphModule
        The prepared graph.
    unit : Unit
        With ranges and integers chosen.
    make_layer : callable
        Makes what is trained of a layer, for instance one of :data:`~cat_plugin.ptq.learned.rounding.ROUNDINGS`.
    bf16 : bool
        Compute dense layers in BF16 while gradients are taken.

    Attributes
    ----------
    layers : dict of QuantOp to SoftLayer
        Layers that have integers.
    activations : dict of ActQuantizer to SoftActivation
        Quantizers that have ranges on uniform grids.
    """

    def __init__(
        self, module: fx.GraphModule, unit: Unit, make_layer: Callable[[QuantOp], Soft], bf16: bool = False
    ) -> None:
        self.module, self.unit, self.bf16 = module, unit, bf16
        self.layers: dict[QuantOp, Soft] = {
            layer: make_layer(layer) for layer in unit.layers if layer.q_weight is not None
        }
        self.activations: dict[ActQuantizer, SoftActivation] = {
            quantizer: SoftActivation(quantizer)
            for quantizer in unit.quantizers
            if quantizer.ready and not isinstance(quantizer, TableQuantizer)
        }

    @property
    def relaxed(self) -> bool:
        """Whether training passes differ from what would be written down."""
        return any(layer.relaxed for layer in self.layers.values())

    def run(self, x: Rows, mask: Callable[[Tensor], Tensor | None] | None = None) -> Rows:
        """Outputs of the unit for the inputs ``x``.

        Parameters
        ----------
        x : Rows
            Values of the unit's sources.
        mask : callable or None
            Gives the drop mask of an activation; None drops nothing.
        """

        def call(child: Any, value: Tensor) -> Any:
            if isinstance(child, ActQuantizer):
                soft = self.activations.get(child)
                if soft is None:
                    return child(value)
                # at 8 bits there is nothing to flatten, and a mask costs as much as the quantizer
                return soft(value, mask(value) if mask is not None and child.bits < 8 else None)
            soft_layer = self.layers.get(child)
            if soft_layer is None:
                return child(value)
            compute = compute_in_bf16 if self.bf16 and torch.is_grad_enabled() else QuantOp.compute
            return compute(child, value, soft_layer.weight(), soft_layer.bias)

        env: dict[fx.Node, Any] = dict(zip(self.unit.sources, x.tensors, strict=True))
        run_nodes(self.module, self.unit.nodes, env, call)
        return Rows([env[node] for node in self.unit.outputs])

    def regularizers(self, share: float) -> list[Tensor]:
        """What the layers add to the loss when ``share`` of the steps, 0..1, is done."""
        terms = (layer.regularizer(share) for layer in self.layers.values())
        return [term for term in terms if term is not None]

    def harden(self) -> None:
        """Write everything trained into the modules."""
        for layer in self.layers.values():
            layer.harden()
        with torch.no_grad():
            for activation in self.activations.values():
                activation.harden()

    def _trained(self) -> list[Tensor]:
        found = [value for layer in self.layers.values() for value in layer.trained()]
        return found + [activation.log_scale for activation in self.activations.values()]

    def state(self) -> Written:
        """Copy of what :meth:`harden` would write over, to go back to."""
        names = ("q_weight", "scale", "zero_point", "bias")
        return Written(
            [(layer, {name: _copied(getattr(layer, name)) for name in names}) for layer in self.layers],
            [(quantizer, quantizer.scale.clone(), quantizer.zero_point) for quantizer in self.activations],
        )

    @staticmethod
    @torch.no_grad()
    def restore(state: Written) -> None:
        """Undo what happened to the modules since :meth:`state`."""
        for layer, values in state.layers:
            for name, value in values.items():
                setattr(layer, name, value)
        for quantizer, scale, zero_point in state.quantizers:
            quantizer.scale.copy_(scale)
            quantizer.zero_point = zero_point


@dataclass(frozen=True)
class Written:
    """Values of a unit's layers and quantizers.

    Attributes
    ----------
    layers : list
        (layer, its tensors by name).
    quantizers : list
        (quantizer, scale, zero point).
    """

    layers: list[tuple[QuantOp, dict[str, Tensor | None]]]
    quantizers: list[tuple[ActQuantizer, Tensor, int]]
