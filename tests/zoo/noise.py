"""How far quantization may move a network's outputs, level by level.

A grid of levels is right where its squared errors are not above those of the grid from the least to the greatest of the values
that it is given, for which the engine is not asked: either all alike, or each times what it moves the outputs by (not quite what
the engine counts, hence a factor, below the four that one bit less makes).  What the errors of right grids add up to is then
measured: the network is run without rounding, with the error of every value added to it or subtracted from it at random, and with
random numbers of half a step in its weights, the steps being those of the weights themselves.  So a scale, a zero point or a
weight that is wrong shows, however much a network makes of small errors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from cat_plugin.torch_compat import register_quantized_decomposed

__all__ = ["expected_noise", "worst_grid"]

register_quantized_decomposed()
_qd = torch.ops.quantized_decomposed
_DRAWS = 4
_TINY = 1e-12


class _Disturbed(fx.Interpreter):
    """A QDQ graph without its rounding, and with noise of that size where `noise` is 1."""

    def __init__(self, module: fx.GraphModule, noise: float, seed: int = 0) -> None:
        super().__init__(module)
        self.noise, self.generator = noise, torch.Generator().manual_seed(seed)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a node: quantizers hand on what they are given."""
        if target is _qd.quantize_per_tensor.default:
            return args[0]
        if target is _qd.dequantize_per_tensor.default:
            x, scale, zero, low, high, *_ = args
            error = _on_grid(x, scale, zero, low, high) - x
            return x + self.noise * error * (self._random(x) * 2).sign()
        result = super().call_function(target, args, kwargs)
        if target is _qd.dequantize_per_channel.default:
            axis, low, high = args[3:6]
            others = [i for i in range(result.ndim) if i != axis]
            step = 2 * result.abs().amax(others, keepdim=True) / (high - low)
            return result + self.noise * step * self._random(result)
        return result

    def _random(self, like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=self.generator) - 0.5


class _Grids(fx.Interpreter):
    """Squared errors of every quantizer's levels, and of levels from the least to the greatest value that it is given."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.errors: dict[str, list[Tensor]] = {}
        # Of values that lie on a grid already a plain one may by chance make nothing: what it makes of any others.
        self.least: dict[str, float] = {}

    def run_node(self, node: fx.Node) -> Any:
        """Run a node; look at what a quantizer is given."""
        if node.target is _qd.quantize_per_tensor.default:
            x, scale, zero, low, high, *_ = self.fetch_args_kwargs_from_env(node)[0]
            least, greatest = float(x.min().clamp_max(0)), float(x.max().clamp_min(0))
            step = max(greatest - least, _TINY) / (high - low)
            grids = (scale, zero), (step, low - round(least / step))
            self.errors[node.name] = [(_on_grid(x, *grid, low, high) - x).square() for grid in grids]
            self.least[node.name] = step**2 / 12
        return super().run_node(node)


class _Reached(fx.Interpreter):
    """A QDQ graph without its rounding, whose quantizers' values gradients can be asked for."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: list[Tensor] = []

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a node: quantizers hand on what they are given."""
        if target is _qd.quantize_per_tensor.default:
            self.values.append(args[0] + torch.zeros((), requires_grad=True))
            return self.values[-1]
        if target is _qd.dequantize_per_tensor.default:
            return args[0]
        return super().call_function(target, args, kwargs)


def _on_grid(x: Tensor, scale: float, zero: int, low: int, high: int) -> Tensor:
    return ((x / scale).round() + zero).clamp(low, high).sub(zero) * scale


def expected_noise(module: fx.GraphModule, inputs: Tensor) -> float:
    """Return the root mean square by which rounding moves the outputs.

    Parameters
    ----------
    module : GraphModule
        A QDQ graph.
    inputs : Tensor of shape (N, ...)
        Rows.
    """
    with torch.no_grad():
        still = _Disturbed(module, 0.0).run(inputs)
        moved = [_Disturbed(module, 1.0, seed).run(inputs) - still for seed in range(_DRAWS)]
    return float(torch.stack(moved).square().mean().sqrt())


def worst_grid(module: fx.GraphModule, inputs: Tensor) -> tuple[float, str]:
    """Return by how much the worst grid is worse than that from the least to the greatest value, and its quantizer's name.

    Parameters
    ----------
    module : GraphModule
        A QDQ graph.
    inputs : Tensor of shape (N, ...)
        Rows; every quantizer is given what the levels before it make of them.

    Returns
    -------
    ratio : float
        Of mean square errors, plain or to first order at the outputs, whichever is less.  About 1 at most where the grid was
        chosen by either.
    name : str
        Of the node.
    """
    grids, reached = _Grids(module), _Reached(module)
    with torch.no_grad():
        grids.run(inputs)
    outputs = reached.run(inputs)
    generator = torch.Generator().manual_seed(0)
    power = [torch.zeros_like(value) for value in reached.values]
    for _ in range(_DRAWS):
        probe = (outputs * torch.randn(outputs.shape, generator=generator)).sum()
        gradients = torch.autograd.grad(probe, reached.values, retain_graph=True, materialize_grads=True)
        for sums, gradient in zip(power, gradients, strict=True):
            sums += gradient.square()
    found = []
    for (name, errors), weight in zip(grids.errors.items(), power, strict=True):
        ratios = []
        for factor in (torch.ones_like(weight), weight):
            chosen, plain = (
                float((each * factor).mean() / factor.mean().clamp_min(_TINY)) for each in errors
            )
            ratios.append(chosen / max(plain, grids.least[name]))
        found.append((min(ratios), name))
    return max(found)
