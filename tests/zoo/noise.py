"""How far quantization may move a network's outputs, from the steps of the grids that its values ask for.

Rounding a value to a grid is off by up to half a step.  So the network is run with random numbers of that size added wherever
its quantized form rounds, and how far its outputs move then is what they may be off by, times a small factor.  The steps are
those of the values themselves, not those that the engine chose: a scale, a zero point or a weight that is wrong shows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from cat_plugin.torch_compat import register_quantized_decomposed

__all__ = ["expected_noise"]

register_quantized_decomposed()
_qd = torch.ops.quantized_decomposed
_DRAWS = 4


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
            x, _, _, low, high, *_ = args
            ends = x.min().clamp_max(0), x.max().clamp_min(0)
            return self._moved(x, (ends[1] - ends[0]) / (high - low)).clamp(
                *ends
            )  # a grid ends where values do
        result = super().call_function(target, args, kwargs)
        if target is _qd.dequantize_per_channel.default:
            axis, low, high = args[3:6]
            others = [i for i in range(result.ndim) if i != axis]
            return self._moved(result, 2 * result.abs().amax(others, keepdim=True) / (high - low))
        return result

    def _moved(self, x: Tensor, step: Tensor) -> Tensor:
        return x + self.noise * step * (torch.rand(x.shape, generator=self.generator) - 0.5)


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
