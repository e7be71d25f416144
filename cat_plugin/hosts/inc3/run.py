"""Hand a recipe to Neural Compressor 3.x."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from neural_compressor.torch import quantization as host
from torch import nn

from cat_plugin.calls import ModelCall
from cat_plugin.errors import HostError
from cat_plugin.hosts import is_registered
from cat_plugin.hosts.inc3 import CATConfig, attach
from cat_plugin.hosts.recording import Replay
from cat_plugin.recipe.tuning import TuningRun

__all__ = ["run"]


def _exported(model: nn.Module, calls: list[ModelCall]) -> nn.Module:
    """The model as the host's static int8 wants it, with a dynamic batch."""
    from neural_compressor.torch.export import export

    args = calls[0].args
    if calls[0].kwargs or not all(isinstance(arg, torch.Tensor) for arg in args):
        raise HostError(
            f"static_quant exports the model, and the calibration gives it {calls[0]}; the host takes tensors by place there: "
            "give tuples of them, or quantize with the plugin's own engine"
        )
    batch = torch.export.Dim("batch", min=1)
    # An example of one sample would make the batch size a constant of the graph.
    example = tuple(torch.cat([arg, arg]) if len(arg) == 1 else arg for arg in args)
    exported: nn.Module = export(
        model, example_inputs=example, dynamic_shapes=tuple({0: batch} for _ in args)
    )
    return exported


def run(
    configurations: list[dict[str, Any]],
    model: nn.Module,
    calls: list[ModelCall],
    eval_fn: Callable[[nn.Module], float] | None,
    run: TuningRun,
) -> nn.Module:
    """Run a recipe through the host's ``autotune``; the :class:`~cat_plugin.recipe.runners.Runner` of 3.x.

    Where there is nothing to tune it is ``quantize``.
    """
    if not is_registered():
        attach()
    configs = [CATConfig(**params) for params in configurations]
    if any(config.uses("static_quant") for config in configs):
        model = _exported(model, calls)
    shared: dict[str, Any] = {"run_fn": Replay(calls), "example_inputs": calls[0].args}
    if eval_fn is None:
        # The exported graph is ours already, and would lose its marks when copied.
        inplace = configs[0].base is None or configs[0].uses("static_quant")
        quantized: nn.Module = host.quantize(model, configs[0], inplace=inplace, **shared)
        return quantized
    tuning = host.TuningConfig(
        config_set=configs, tolerable_loss=run.criterion.tolerance, max_trials=run.criterion.max_trials
    )
    tuning.cat_run = run
    best: nn.Module = host.autotune(model, tuning, eval_fn, **shared)
    return best
