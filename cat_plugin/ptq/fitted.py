"""What has been chosen for the layers and quantizers of a graph, as tensors by name, and put back."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, fx

from cat_plugin.ptq.graph.modules import QuantOp
from cat_plugin.ptq.quantizers.tables import FittedQuantizer
from cat_plugin.ptq.quantizers.uniform import ActQuantizer

__all__ = ["PARTS", "fitted_layers", "put_back", "tensors_of"]

PARTS = ("weight", "q_weight", "scale", "zero_point")
"""What is chosen for every layer, besides its bias."""


def fitted_layers(module: fx.GraphModule) -> dict[str, QuantOp]:
    """The layers whose integers are chosen, by their names in the graph."""
    return {
        name: child
        for name, child in module.named_modules()
        if isinstance(child, QuantOp) and child.q_weight is not None
    }


def tensors_of(module: fx.GraphModule, layers: Collection[str]) -> dict[str, Tensor]:
    """Copies on the CPU of what was chosen for some layers, of every range and of every layer's bits.

    Parameters
    ----------
    module : fx.GraphModule
        With quantizers.
    layers : collection of str
        Names of fitted layers, in the graph.
    """
    tensors: dict[str, Tensor] = {}
    for name, child in module.named_modules():
        if isinstance(child, QuantOp):
            tensors[f"{name}.w_bits"] = torch.tensor(child.w_bits)
            for part in (*PARTS, "bias") if name in layers else ():
                value = getattr(child, part)
                if value is not None:
                    tensors[f"{name}.{part}"] = value.detach().cpu().clone().contiguous()
        elif isinstance(child, ActQuantizer) and child.ready:
            tensors[f"{name}.grid"] = torch.tensor([child.zero_point, int(child.signed)])
            tensors[f"{name}.scale"] = child.scale.detach().cpu().clone()
            if isinstance(child, FittedQuantizer):
                tensors[f"{name}.levels"] = child.levels.detach().cpu().clone()
    return tensors


def put_back(module: fx.GraphModule, tensors: Mapping[str, Tensor]) -> None:
    """Put what :func:`tensors_of` gave into the graph, in place."""
    for name, child in module.named_modules():
        if isinstance(child, QuantOp):
            if f"{name}.w_bits" in tensors:
                child.w_bits = int(tensors[f"{name}.w_bits"])
            if f"{name}.q_weight" in tensors:
                for part in PARTS:
                    setattr(child, part, tensors[f"{name}.{part}"].to(child.weight.device))
                bias = tensors.get(f"{name}.bias")
                child.bias = None if bias is None else bias.to(child.weight.device)
        elif isinstance(child, ActQuantizer) and f"{name}.grid" in tensors:
            zero_point, signed = tensors[f"{name}.grid"].tolist()
            if isinstance(child, FittedQuantizer):
                child.set_levels(tensors[f"{name}.levels"])
            else:
                child.set_range(float(tensors[f"{name}.scale"]), zero_point, bool(signed))
