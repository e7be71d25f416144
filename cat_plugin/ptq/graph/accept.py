"""What may be quantized: from the module that a caller holds to one in float32 that can be traced."""

from __future__ import annotations

import copy
from itertools import chain

import torch
from torch import nn

from cat_plugin.errors import CATTypeError, QuantizationError

__all__ = ["acceptable"]

_NARROW = (torch.float16, torch.bfloat16, torch.float64)


def acceptable(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """The module behind wrappers, in float32.

    Parameters
    ----------
    model : nn.Module
        What the caller gave; left unchanged.

    Returns
    -------
    model : nn.Module
        The original of a model from ``torch.compile``, what a ``DataParallel`` holds, or the model itself; a copy in
        float32 where it has parameters of another floating type.
    notes : list of str
        What the caller should know of it.

    Raises
    ------
    CATTypeError
        If it is no module.
    QuantizationError
        If it is scripted, or has parameters on the meta device.
    """
    notes: list[str] = []
    if not isinstance(model, nn.Module):
        raise CATTypeError(f"the model is a {type(model).__name__}; expected a torch.nn.Module.")
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(original := getattr(model, "_orig_mod", None), nn.Module):
            model = original
        else:
            break
    if isinstance(model, torch.jit.ScriptModule):
        raise QuantizationError(
            "the model is a TorchScript module, whose code cannot be traced; expected the torch.nn.Module that it was "
            "scripted or traced from. Quantize that one."
        )
    tensors = dict(chain(model.named_parameters(), model.named_buffers()))
    empty = [name for name, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise QuantizationError(
            f"{len(empty)} of the model's parameters have no values (they are on the meta device), the first is "
            f"{empty[0]!r}; expected a model with its weights. Load them before quantizing."
        )
    others = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.dtype in _NARROW})
    if others:
        model = copy.deepcopy(model).float()
        notes.append(
            f"the model has {' and '.join(others)} parameters; it was converted to float32 and computes in it"
        )
    return model, notes
