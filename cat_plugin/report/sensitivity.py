"""How much each layer matters: the model in full precision but for one layer, which is rounded to nearest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cat_plugin.ptq.learned.quality import divergence
from cat_plugin.ptq.quantizers.observers import search_activation_range, search_weight_range, subsample
from cat_plugin.ptq.sensitivity_analysis import rounded

__all__ = ["layer_sensitivity"]

_SAMPLE = 1 << 16


def _rounded_weight(weight: Tensor, bits: int) -> Tensor:
    scale, zero = search_weight_range(weight, bits, symmetric=False)
    shape = (-1, *[1] * (weight.ndim - 1))
    return rounded(weight, scale.view(shape), zero.view(shape), bits, True)


class _InputRounding:
    """A forward pre-hook that rounds a layer's input; the range is searched on the first batch that comes by."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.range: tuple[float, int, bool] | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        if self.range is None:
            sample = subsample(x.detach(), _SAMPLE, torch.Generator().manual_seed(0))
            self.range = search_activation_range(sample.float(), self.bits, symmetric=False)
        scale, zero, signed = self.range
        return (rounded(x, scale, zero, self.bits, signed), *args[1:])


@torch.no_grad()
def layer_sensitivity(
    model: nn.Module,
    layers: Iterable[Mapping[str, Any]],
    inputs: Tensor,
    *,
    batch_size: int = 64,
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Measure what quantizing one layer alone does to the prediction.

    Parameters
    ----------
    model : torch.nn.Module
        In full precision and in evaluation mode; unchanged afterwards.
    layers : iterable of mapping
        With ``name``, ``w_bits`` and ``a_bits`` (None for float).  Layers that are no module of `model`, or no convolution
        or linear one, are left out.
    inputs : Tensor of shape (N, ...)
        What to measure on.
    batch_size : int
        Rows at a time.
    progress : callable, optional
        Called with each layer's name.

    Returns
    -------
    list of dict
        ``name``, ``divergence`` (mean over rows of ``KL(softmax(z_fp) || softmax(z))``, in nats) and ``changed`` (share of
        rows whose class is another).
    """
    batches = torch.split(inputs, batch_size)

    def logits(weights: dict[str, Tensor]) -> Tensor:
        return torch.cat([functional_call(model, weights, (batch,)) for batch in batches]).float()

    reference = logits({})
    found = []
    for layer in layers:
        name, w_bits, a_bits = layer["name"], layer.get("w_bits"), layer.get("a_bits")
        try:
            module = model.get_submodule(name)
        except AttributeError:
            continue
        if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear) or not (w_bits or a_bits):
            continue
        if progress is not None:
            progress(name)
        weights = {f"{name}.weight": _rounded_weight(module.weight, w_bits)} if w_bits else {}
        handle = module.register_forward_pre_hook(_InputRounding(a_bits)) if a_bits else None
        try:
            changed = logits(weights)
        finally:
            if handle is not None:
                handle.remove()
        found.append(
            {
                "name": name,
                "divergence": float(divergence(changed, reference, 1.0)),
                "changed": float((changed.argmax(1) != reference.argmax(1)).float().mean()),
            }
        )
    return found
