"""How far single channels of a transformer's activations stand out, before and after channels were scaled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["has_layer_norms", "outliers"]

_LINEAR = "aten.linear.default"
_AROUND = ("dequantize_per_", "quantize_per_")


def has_layer_norms(model: nn.Module) -> bool:
    """Whether a model normalises its tokens, as transformers do."""
    return any(
        isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
        for module in model.modules()
    )


class _Peaks:
    """The largest magnitude of each channel (the last axis) seen so far, by layer."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def see(self, name: str, value: Tensor) -> None:
        peaks = value.detach().abs().reshape(-1, value.shape[-1]).amax(0)
        self.found[name] = torch.maximum(self.found[name], peaks) if name in self.found else peaks

    def ratios(self) -> dict[str, float]:
        """Largest channel over the median one."""
        return {
            name: float(peaks.max() / median)
            for name, peaks in self.found.items()
            if (median := float(peaks.median())) > 0
        }


class _Watching(torch.fx.Interpreter):
    """Runs a QDQ graph and sees what its linear layers' inputs are before they are rounded."""

    def __init__(self, module: torch.fx.GraphModule, peaks: _Peaks) -> None:
        super().__init__(module)
        self.peaks = peaks
        self.wanted: dict[torch.fx.Node, list[str]] = {}
        for node in module.graph.nodes:
            if str(node.target) == _LINEAR:
                data, weight = node.args[0], node.args[1]
                while any(part in str(data.target) for part in _AROUND):
                    data = data.args[0]
                while weight.op != "get_attr":
                    weight = weight.all_input_nodes[0]
                stem = str(weight.target).rstrip("_").removesuffix("weight").rstrip("._")
                self.wanted.setdefault(data, []).append(stem)

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        for name in self.wanted.get(n, ()):
            self.peaks.see(name, value)
        return value


@torch.no_grad()
def outliers(
    model: nn.Module, program: ExportedProgram, inputs: Tensor, batch_size: int
) -> list[dict[str, Any]]:
    """Compare the inputs of linear layers in full precision and in the quantized graph, where channels may be scaled.

    Parameters
    ----------
    model : torch.nn.Module
        In full precision and in evaluation mode.
    program : torch.export.ExportedProgram
        The QDQ graph made of it, corrected or not.
    inputs : Tensor of shape (N, ...)
        What both are run on.
    batch_size : int
        Rows at a time.

    Returns
    -------
    list of dict
        ``name`` of each layer that is in both, and the largest magnitude of its largest channel over that of its median
        channel, ``before`` and ``after``.
    """
    full, quantized = _Peaks(), _Peaks()
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: full.see(name, args[0]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    graph: Any = program.module()
    watching = _Watching(graph, quantized)
    try:
        for batch in torch.split(inputs, batch_size):
            model(batch)
            watching.run(batch)
    finally:
        for hook in hooks:
            hook.remove()
    before = full.ratios()
    after = {name.removeprefix("model."): ratio for name, ratio in quantized.ratios().items()}
    return [{"name": name, "before": before[name], "after": after[name]} for name in before if name in after]
