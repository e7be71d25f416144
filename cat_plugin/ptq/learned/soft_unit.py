"""A unit of the graph made differentiable: runs its nodes with learned weights and steps, or in full precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from cat_plugin.ptq.graph.modules import QuantOp
from cat_plugin.ptq.graph.ops import is_batch_size
from cat_plugin.ptq.graph.units import Unit
from cat_plugin.ptq.learned.precision import compute_in_bf16
from cat_plugin.ptq.learned.steps import SoftActivation
from cat_plugin.ptq.quantizers.uniform import ActQuantizer
from cat_plugin.ptq.transforms.equalization import Ceiling

__all__ = ["SoftUnit", "float_call", "run_float", "run_nodes"]


def run_nodes(
    module: fx.GraphModule, nodes: list[Any], env: dict[Any, Any], call: Callable[[Any, Tensor], Any]
) -> None:
    """Execute ``nodes`` in order on the values in ``env``; ``call`` runs layers and quantizers.

    Nodes outside the list (constants, batch sizes) are evaluated when they are read.
    """
    count = len(next(iter(env.values())))
    for node in nodes:
        if node.op == "call_module":
            x = _value(node.args[0], module, env, count)
            env[node] = call(module.get_submodule(str(node.target)), x)
        elif node.op != "get_attr" and not is_batch_size(node):
            env[node] = _result(node, module, env, count)


def _result(node: Any, module: fx.GraphModule, env: dict[Any, Any], count: int) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _value(n, module, env, count))
    return node.target(*args, **kwargs)


def _value(node: Any, module: fx.GraphModule, env: dict[Any, Any], count: int) -> Any:
    # not a closure that calls itself: such a cycle keeps a step's activations until the garbage collector comes by
    if node not in env:
        if is_batch_size(node):
            return count
        if node.op == "get_attr":
            return getattr(module, str(node.target))
        env[node] = _result(node, module, env, count)
    return env[node]


def float_call(child: Any, x: Tensor) -> Any:
    """What a layer or quantizer of a prepared graph does in full precision."""
    if isinstance(child, QuantOp):
        return child.compute(x, child.float_weight, child.float_bias)
    return child.full_precision(x) if isinstance(child, Ceiling) else x


def run_float(module: fx.GraphModule, nodes: list[Any], source: Any, x: Tensor, output: Any) -> Tensor:
    """Value of ``output`` in full precision when ``source`` has the value ``x``."""
    env = {source: x}
    run_nodes(module, nodes, env, float_call)
    return env[output]


def _copied(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.clone()


class SoftUnit:
    """A unit whose rounding, steps and biases are being learned.

    Parameters
    ----------
    module : fx.GraphModule
        The prepared graph.
    unit : Unit
        With ranges and integers chosen.
    make_layer : callable
        Makes the relaxation of a layer, for instance a
        :class:`~cat_plugin.ptq.learned.rounding.SoftLayer`.
    make_activation : callable
        Makes the relaxation of an activation quantizer.
    bf16 : bool
        Compute dense convolutions in BF16 while gradients are taken.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        unit: Unit,
        make_layer: Callable[[QuantOp], Any],
        make_activation: Callable[[ActQuantizer], Any] = SoftActivation,
        bf16: bool = False,
    ) -> None:
        self.bf16 = bf16
        self.module, self.unit = module, unit
        self.layers: dict[QuantOp, Any] = {
            layer: make_layer(layer) for layer in unit.layers if layer.q_weight is not None
        }
        self.activations: dict[ActQuantizer, Any] = {
            q: make_activation(q) for q in unit.quantizers if q.ready and q.enabled
        }

    def run(
        self,
        x: Tensor,
        mask: Callable[[Tensor], Tensor | None] | None = None,
        taps: dict[Any, Tensor] | None = None,
    ) -> Tensor:
        """Output of the unit for the input ``x``.

        Parameters
        ----------
        x : Tensor
            Value of the unit's source.
        mask : callable or None
            Gives the drop mask of an activation; None drops nothing.
        taps : dict or None
            Its keys are nodes of the unit whose values are to be filled in.
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

        env = {self.unit.source: x}
        run_nodes(self.module, self.unit.nodes, env, call)
        if taps is not None:
            for node in taps:
                taps[node] = env[node]
        return env[self.unit.output]

    def harden(self) -> None:
        """Write everything learned into the modules."""
        for layer in self.layers.values():
            layer.harden()
        with torch.no_grad():
            for activation in self.activations.values():
                activation.harden()

    def _parameters(self) -> list[Tensor]:
        owners = [*self.layers.values(), *self.activations.values()]
        found = [
            getattr(owner, name, None) for owner in owners for name in ("latent", "log_scale", "bias", "zero")
        ]
        return [p for p in found if isinstance(p, Tensor) and p.requires_grad]

    def snapshot(self) -> list[Tensor]:
        """Copy of everything that is being learned."""
        return [p.detach().clone() for p in self._parameters()]

    @torch.no_grad()
    def load(self, snapshot: list[Tensor]) -> None:
        """Go back to a :meth:`snapshot`."""
        for parameter, value in zip(self._parameters(), snapshot, strict=True):
            parameter.copy_(value)

    def state(self) -> list[Any]:
        """Copy of what :meth:`harden` would write over, to go back to."""
        layers = [
            (
                layer,
                {name: _copied(getattr(layer, name)) for name in ("q_weight", "scale", "zero_point", "bias")},
            )
            for layer in self.layers
        ]
        return [layers, [(q, q.scale.clone(), q.zero_point) for q in self.activations]]

    @staticmethod
    def restore(state: list[Any]) -> None:
        """Undo what happened to the modules since :meth:`state`."""
        for layer, values in state[0]:
            for name, value in values.items():
                setattr(layer, name, value)
        for quantizer, scale, zero_point in state[1]:
            quantizer.scale.copy_(scale)
            quantizer.zero_point = zero_point
